"""How many tokens to draft: what a step would bring, by each request's own acceptance, over what it would take, as measured."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import log

TRIED = 4.0  # drafted tokens' worth of what is usual in its domain that a new request begins with
KEPT = 0.9  # of a request's evidence, from step to step: text changes
FADING = 0.98  # of the measured costs
SIZES = 25.0  # tokens^2: how much sizes must vary before their cost is believed
PROBE = 16  # steps after which a request that drafts nothing tries one token, to learn whether it still should


def drafting(most: int, drafter: str = "MemoryDrafter") -> dict[str, object]:
    """vLLM's options for drafting up to `most` tokens; `drafter` names a class of memdec.server.worker.drafter."""
    return {
        "speculative_config": {
            "method": "custom_class",
            "model": f"memdec.server.worker.drafter.{drafter}",
            "num_speculative_tokens": most,
        },
        "scheduler_cls": "memdec.server.worker.drafter.DraftingScheduler",
    }


@dataclass
class Acceptance:
    """One request's drafts so far."""

    accepted: float
    tried: float = TRIED
    idle: int = 0
    """Steps since its last draft."""

    def add(self, drafted: int, accepted: int) -> None:
        """A draft was verified: tokens after the first rejected one were not tried."""
        self.accepted = KEPT * self.accepted + accepted
        self.tried = KEPT * self.tried + accepted + (accepted < drafted)

    @property
    def rate(self) -> float:
        """Probability that a drafted token is accepted, if those before it were."""
        return min(max(self.accepted / self.tried, 0.01), 0.98)


@dataclass
class StepCost:
    """Seconds of a step without its drafting, as a line over the tokens it verifies: least squares, old steps fading."""

    sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    """Of 1, x, x^2, y and x * y, for x tokens and y seconds."""

    def add(self, tokens: int, seconds: float) -> None:
        """One step. Steps that took several times what is expected (another process, a stall) count as if they hadn't."""
        if self.sums[0] > 5:
            seconds = min(seconds, 3 * self.of(tokens))
        for i, value in enumerate((1.0, tokens, tokens * tokens, seconds, tokens * seconds)):
            self.sums[i] = FADING * self.sums[i] + value

    @property
    def slope(self) -> float:
        """Expected seconds for a further token; taken to be a fiftieth of a step until sizes have varied enough to tell."""
        count, x, xx, y, xy = self.sums
        if not count:
            return 0.02
        mean, height = x / count, y / count
        return max(0.0, (xy / count - mean * height + SIZES * 0.02 * height) / (xx / count - mean * mean + SIZES))

    def of(self, tokens: int) -> float:
        """Expected seconds."""
        count, x, _, y, _ = self.sums
        if not count:
            return 1.0 + self.slope * tokens
        return max(y / count + self.slope * (tokens - x / count), 0.2 * y / count, 1e-9)


class DraftLengths:
    """Chooses each request's number of tokens to draft, from 0 to `most`."""

    def __init__(self, most: int, share: float) -> None:
        """`share`: a decoder's bytes over all that a step reads, which a drafted token's cost is taken to be until it is measured."""
        self.most, self.share = most, share
        self.step = StepCost()
        self.draft = 0.0
        """Seconds of drafting one token for all who draft; 0: not measured yet."""
        self.requests: dict[str, Acceptance] = {}
        self.usual: dict[Hashable, float] = {}
        """By kind, which is what requests are accepted alike by: share of the tried tokens that is accepted."""
        self.counts: dict[str, tuple[int, int]] = {}
        """By drafter: tokens drafted and tokens accepted, since the start."""

    def drafted(self, seconds: float) -> None:
        """One token was drafted for all who draft."""
        seconds = min(seconds, 3 * self.draft) if self.draft else seconds
        self.draft = 0.9 * self.draft + 0.1 * seconds if self.draft else seconds

    def begin(self, request: str, kind: Hashable, lam: float) -> None:
        """A request that drafts, if it is new: what it may expect is what others of its kind saw, or follows from lambda, the least there is."""
        if request not in self.requests:
            self.requests[request] = Acceptance(TRIED * self.usual.setdefault(kind, (1 + lam) / 2))

    def verified(self, request: str, kind: Hashable, drafted: int, accepted: int) -> None:
        """What became of a request's draft."""
        self.requests[request].add(drafted, accepted)
        tried = accepted + (accepted < drafted)
        weight = 0.99**tried
        self.usual[kind] = weight * self.usual[kind] + (1 - weight) * accepted / tried

    def count(self, drafter: str, drafted: int, accepted: int) -> None:
        """Add a draft of any request to what its drafter has done."""
        before = self.counts.get(drafter, (0, 0))
        self.counts[drafter] = (before[0] + drafted, before[1] + accepted)

    def keep(self, requests: set[str]) -> None:
        """Forget all but these."""
        self.requests = {name: seen for name, seen in self.requests.items() if name in requests}

    def choose(self, requests: Sequence[str], others: int, free: bool = False) -> list[int]:
        """Tokens to draft for each of these requests, which have begun, in a step that has `others` tokens besides; `free`: drafting takes no time.

        The number k that brings the most tokens a second: (1 - a^(k+1)) / (1 - a) expected tokens of each (arXiv 2211.17192, eq. 1) over
        the time of the step and of k drafts, which all share. Who is accepted less than others stops where a token is not worth its
        place in the step.
        """
        rates = [self.requests[name].rate for name in requests]
        draft = 0.0 if free else self.draft or self.share * self.step.of(others + len(rates))
        best, fastest, expected, chances = 0, 0.0, 0.0, [1.0] * len(rates)
        for k in range(self.most + 1):
            expected += sum(chances)
            speed = expected / (self.step.of(others + len(rates) * (k + 1)) + k * draft)
            if speed > fastest:
                best, fastest = k, speed
            chances = [chance * rate for chance, rate in zip(chances, rates, strict=True)]
        worth = self.step.slope * fastest
        # The longest draft whose last token is worth its place; none where a place costs more than any token brings.
        lengths = [best if rate**best >= worth else max(0, int(log(worth) / log(rate))) for rate in rates]
        return [self._probed(self.requests[name], length) for name, length in zip(requests, lengths, strict=True)]

    def _probed(self, seen: Acceptance, length: int) -> int:
        """One token instead of none, now and then."""
        seen.idle = 0 if length else seen.idle + 1
        if seen.idle <= PROBE:
            return length
        seen.idle = 0
        return min(1, self.most)
