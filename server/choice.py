"""A request's domain, mode and lambda as entries of SamplingParams.extra_args, which carry them through vLLM."""

from dataclasses import dataclass
from typing import Any

from memdec.server.routing.domains import DECODER, MEMORIES, MIXED, NONE, RAG, Shares

MODE, DOMAIN, LAMBDA, STRIDE, OPEN, SOURCES = "memory", "domain", "lambda", "rag_stride", "rag_open", "memory_sources"
SEGMENT = "rag_segment"  # of an answer made in several passes: 1 the first, 2 a later one; set by the engine
SHARES = "memory_shares"  # the numbers of Shares, one after the other
SLOT = "memory_slot"  # where the domain's decoder was when the request reached the engine; set by the engine
BESIDE = "memory_beside"  # with `both`: the slot that its n-gram memory had then
MAX_SLOT = (1 << 16) - 1  # the largest number of a slot: it travels as two bytes
CLIENT = "memory_client"  # the client in whose fair share the scheduler runs the request; set by the engine client
KEY = "key "  # what the name of a client with an API key begins with
SCORED = "prompt_scored"  # of a request for its prompt alone; set by the front end
RESERVED = (MODE, DOMAIN, LAMBDA, STRIDE, OPEN, SOURCES, SHARES, SEGMENT, SLOT, BESIDE, CLIENT, SCORED)


@dataclass(frozen=True)
class MemoryChoice:
    """A mode and a domain. `decoder`, `knn`, `ngram` and `both` are mixed in with lambda, in the engine's step; `rag` changes the prompt; `none` is the base alone."""

    mode: str
    domain: str
    lam: float = 0.0
    stride: int = 0
    """With `rag`: retrieve anew every so many tokens; 0: once."""
    open_ended: bool = False
    """With `rag`: the client set no limit to the answer, which may therefore give way to the passage."""
    slot: int = 0
    """With `decoder`, `ngram` or `both`: the slot of the revision that answers, to the end even if a newer one is loaded; 0: the worker looks the name up."""
    sources: bool = False
    """With `ngram`: whether the answer names the documents that its tokens were seen in."""
    shares: Shares = ()
    """With `both`: how the decoder and the n-gram memory share lambda."""
    beside: int = 0
    """With `both`: the slot of the n-gram memory, as `slot` is the decoder's."""

    @classmethod
    def of(cls, params: object) -> "MemoryChoice | None":
        """The choice in a request's SamplingParams (or pooling parameters, which have none); None: no domain was named."""
        extra = getattr(params, "extra_args", None)
        if not extra or extra.get(DOMAIN) is None:
            return None
        lam, stride, slot = float(extra.get(LAMBDA) or 0.0), int(extra.get(STRIDE) or 0), int(extra.get(SLOT) or 0)
        shares = extra.get(SHARES) or []
        return cls(
            extra[MODE], extra[DOMAIN], lam, stride, bool(extra.get(OPEN)), slot, bool(extra.get(SOURCES)),
            tuple(zip(shares[::2], shares[1::2], strict=True)), int(extra.get(BESIDE) or 0),
        )  # fmt: skip

    def to_extra_args(self) -> dict[str, Any]:
        """The entries to put into SamplingParams.extra_args."""
        entries: dict[str, Any] = {
            MODE: self.mode, DOMAIN: self.domain, LAMBDA: self.lam, STRIDE: self.stride, OPEN: int(self.open_ended),
        }  # fmt: skip
        if self.shares:
            entries[SHARES] = [share for pair in self.shares for share in pair]
        return entries | ({SOURCES: 1} if self.sources else {})

    @property
    def mixed(self) -> bool:
        """Whether a distribution is mixed into the base's.

        Lambda 0 is the base alone: it costs nothing, reads and fills the base's own cache blocks, and is exact.
        """
        return self.mode in MIXED and self.lam > 0

    @property
    def decoded(self) -> bool:
        """Whether the domain's decoder runs, which fills cache blocks of its own."""
        return self.mixed and DECODER in MEMORIES.get(self.mode, ())

    @property
    def label(self) -> tuple[str, str]:
        """(mode, domain) label of the metrics; lambda 0 counts as mode `none`."""
        return (self.mode if self.mixed or self.mode == RAG else NONE), self.domain
