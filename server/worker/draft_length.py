"""Chooses how many tokens to draft, so that steps yield most tokens per second: from each request's acceptance rate and the measured time of steps."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import log

TRIED = 4.0  # weight, in drafted tokens, of the usual acceptance rate of its kind in a new request's estimate
KEPT = 0.9  # factor on a request's older drafts with each new one, since its text changes
FADING = 0.98  # factor on older steps in the measured cost, with each new step
SIZES = 25.0  # tokens^2: weight of the assumed cost of a token, against the variance of the sizes of measured steps
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
    """How many of a request's drafted tokens were accepted; recent ones count most."""

    accepted: float
    tried: float = TRIED
    idle: int = 0
    """Steps since its last draft."""

    def add(self, drafted: int, accepted: int) -> None:
        """Record a verified draft. Tokens after the first rejected one don't count as tried."""
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
    """Fading sums of 1, x, x^2, y and x * y, for x tokens and y seconds."""

    def add(self, tokens: int, seconds: float) -> None:
        """Record a step. One that took over three times what is expected (another process, a stall) counts as three times."""
        if self.sums[0] > 5:
            seconds = min(seconds, 3 * self.of(tokens))
        for i, value in enumerate((1.0, tokens, tokens * tokens, seconds, tokens * seconds)):
            self.sums[i] = FADING * self.sums[i] + value

    @property
    def slope(self) -> float:
        """Expected seconds for one more token; about a fiftieth of a step until steps of different sizes have shown it."""
        count, x, xx, y, xy = self.sums
        if not count:
            return 0.02
        mean, height = x / count, y / count
        return max(0.0, (xy / count - mean * height + SIZES * 0.02 * height) / (xx / count - mean * mean + SIZES))

    def of(self, tokens: int) -> float:
        """Expected seconds of a step of `tokens` tokens."""
        count, x, _, y, _ = self.sums
        if not count:
            return 1.0 + self.slope * tokens
        return max(y / count + self.slope * (tokens - x / count), 0.2 * y / count, 1e-9)


class DraftLengths:
    """Chooses each request's number of tokens to draft, from 0 to `most`."""

    def __init__(self, most: int, share: float) -> None:
        """`share`: a decoder's bytes over those of base and decoder; until it is measured, drafting a token is assumed to take this share of a step."""
        self.most, self.share = most, share
        self.step = StepCost()
        self.draft = 0.0
        """Seconds in which one token is drafted for all requests that draft; 0 until it is measured."""
        self.requests: dict[str, Acceptance] = {}
        """Request -> its estimate."""
        self.usual: dict[Hashable, float] = {}
        """Kind of request (see MemoryDrafter) -> share of its tried tokens that is accepted."""
        self.counts: dict[str, tuple[int, int]] = {}
        """Drafter -> tokens drafted and tokens accepted, since the start."""

    def drafted(self, seconds: float) -> None:
        """Record the seconds in which one token was drafted for all requests that draft."""
        seconds = min(seconds, 3 * self.draft) if self.draft else seconds
        self.draft = 0.9 * self.draft + 0.1 * seconds if self.draft else seconds

    def begin(self, request: str, kind: Hashable, lam: float) -> None:
        """Begin a new request's estimate with the acceptance rate of its kind; for the first of a kind, halfway from lambda, its lower bound, to 1."""
        if request not in self.requests:
            self.requests[request] = Acceptance(TRIED * self.usual.setdefault(kind, (1 + lam) / 2))

    def verified(self, request: str, kind: Hashable, drafted: int, accepted: int) -> None:
        """Record how much of a request's draft was accepted."""
        self.requests[request].add(drafted, accepted)
        tried = accepted + (accepted < drafted)
        weight = 0.99**tried
        self.usual[kind] = weight * self.usual[kind] + (1 - weight) * accepted / tried

    def count(self, drafter: str, drafted: int, accepted: int) -> None:
        """Add a draft to the counts of its drafter."""
        before = self.counts.get(drafter, (0, 0))
        self.counts[drafter] = (before[0] + drafted, before[1] + accepted)

    def keep(self, requests: set[str]) -> None:
        """Drop the estimates of all other requests."""
        self.requests = {name: seen for name, seen in self.requests.items() if name in requests}

    def choose(self, requests: Sequence[str], others: int, free: bool = False) -> list[int]:
        """Number of tokens to draft for each request, after `begin`, in a step that has `others` tokens besides; `free`: drafting takes no time.

        The common number k yields most tokens per second: (1 - a^(k+1)) / (1 - a) expected tokens of each request (arXiv 2211.17192, eq. 1)
        over the time of the step and of drafting k tokens. A request that is accepted less than others drafts fewer: it stops where one more
        token is not worth its place in the step.
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
        """The chosen length; but one token if a request would draft none for more than PROBE steps."""
        seen.idle = 0 if length else seen.idle + 1
        if seen.idle <= PROBE:
            return length
        seen.idle = 0
        return min(1, self.most)
