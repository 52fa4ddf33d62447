"""How many tokens to draft: what a step would bring, by each request's own acceptance, over what it would take, as measured."""

from dataclasses import dataclass, field

ACCEPTED, TRIED = 3.0, 4.0  # what a request is taken to have seen before its first draft
KEPT = 0.9  # of a request's evidence, from step to step: text changes
FADING = 0.98  # of the measured costs
PROBE = 16  # steps after which a request that drafts nothing tries one token, to learn whether it still should


@dataclass
class Acceptance:
    """One request's drafts so far."""

    accepted: float = ACCEPTED
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
        return min(self.accepted / self.tried, 0.98)


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

    def of(self, tokens: int) -> float:
        """Expected seconds. Before sizes have varied, a further token is taken to cost a fiftieth of a step."""
        count, x, xx, y, xy = self.sums
        if not count:
            return 1.0 + 0.02 * tokens
        mean, spread = x / count, xx / count - (x / count) ** 2
        height = y / count
        slope = max(0.0, (xy / count - mean * height) / spread) if spread > 0.5 else 0.02 * height
        return max(height + slope * (tokens - mean), 0.2 * height)


class DraftLengths:
    """Chooses each request's number of tokens to draft, from 0 to `most`."""

    def __init__(self, most: int, share: float) -> None:
        """`share`: a decoder's bytes over all that a step reads, which a drafted token's cost is taken to be until it is measured."""
        self.most, self.share = most, share
        self.step = StepCost()
        self.draft = 0.0
        """Seconds of drafting one token for all who draft; 0: not measured yet."""
        self.requests: dict[str, Acceptance] = {}

    def drafted(self, seconds: float) -> None:
        """One token was drafted for all who draft."""
        seconds = min(seconds, 3 * self.draft) if self.draft else seconds
        self.draft = 0.9 * self.draft + 0.1 * seconds if self.draft else seconds

    def verified(self, request: str, drafted: int, accepted: int) -> None:
        """What became of a request's draft."""
        self.requests.setdefault(request, Acceptance()).add(drafted, accepted)

    def keep(self, requests: set[str]) -> None:
        """Forget all but these."""
        self.requests = {name: seen for name, seen in self.requests.items() if name in requests}

    def choose(self, request: str, others: int, drafting: int) -> int:
        """Tokens to draft for a request, where `drafting` requests draft as many, and a step has `others` tokens besides.

        The number k that brings the most tokens a second: (1 - a^(k+1)) / (1 - a) expected tokens (arXiv 2211.17192, eq. 1) over the
        step's and k drafts' time.
        """
        seen = self.requests.setdefault(request, Acceptance())
        best, most = 0, 0.0
        expected = 0.0
        draft = self.draft or self.share * self.step.of(others + drafting)
        for k in range(self.most + 1):
            expected += seen.rate**k
            speed = expected / (self.step.of(others + drafting * (k + 1)) + k * draft)
            if speed > most:
                best, most = k, speed
        seen.idle = 0 if best else seen.idle + 1
        if seen.idle > PROBE:
            seen.idle, best = 0, min(1, self.most)
        return best
