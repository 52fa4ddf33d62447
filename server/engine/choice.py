"""What a request chose, as it travels through vLLM: two entries of SamplingParams.extra_args."""

from dataclasses import dataclass
from typing import Any

DOMAIN, LAMBDA = "domain", "lambda"


@dataclass(frozen=True)
class MemoryChoice:
    """A domain's decoder, mixed in with lambda > 0."""

    domain: str
    lam: float

    @classmethod
    def of(cls, params: Any) -> "MemoryChoice | None":
        """The choice in a request's SamplingParams (or pooling parameters, which have none); None: the base alone.

        Lambda 0 is the base alone too: it costs nothing, reads and fills the base's own cache blocks, and is exact.
        """
        extra = getattr(params, "extra_args", None)
        if not extra or extra.get(DOMAIN) is None or not extra[LAMBDA]:
            return None
        return cls(extra[DOMAIN], float(extra[LAMBDA]))

    def to_extra_args(self) -> dict[str, str | float]:
        """The entries to put into SamplingParams.extra_args."""
        return {DOMAIN: self.domain, LAMBDA: self.lam}
