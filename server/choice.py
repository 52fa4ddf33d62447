"""A request's domain, mode and lambda as entries of SamplingParams.extra_args, which carry them through vLLM."""

from dataclasses import dataclass

from memdec.server.routing.domains import MIXED, NONE, RAG

MODE, DOMAIN, LAMBDA, STRIDE, OPEN, SOURCES = "memory", "domain", "lambda", "rag_stride", "rag_open", "memory_sources"
SEGMENT = "rag_segment"  # of an answer made in several passes: 1 the first, 2 a later one; set by the engine
SLOT = "memory_slot"  # where the domain's decoder was when the request reached the engine; set by the engine
MAX_SLOT = (1 << 16) - 1  # the largest number of a slot: it travels as two bytes
CLIENT = "memory_client"  # the client in whose fair share the scheduler runs the request; set by the engine client
KEY = "key "  # what the name of a client with an API key begins with
SCORED = "prompt_scored"  # of a request for its prompt alone; set by the front end
RESERVED = (MODE, DOMAIN, LAMBDA, STRIDE, OPEN, SOURCES, SEGMENT, SLOT, CLIENT, SCORED)


@dataclass(frozen=True)
class MemoryChoice:
    """A mode and a domain. `decoder`, `knn` and `ngram` are mixed in with lambda, in the engine's step; `rag` changes the prompt; `none` is the base alone."""

    mode: str
    domain: str
    lam: float = 0.0
    stride: int = 0
    """With `rag`: retrieve anew every so many tokens; 0: once."""
    open_ended: bool = False
    """With `rag`: the client set no limit to the answer, which may therefore give way to the passage."""
    slot: int = 0
    """With `decoder` or `ngram`: the slot of the revision that answers, to the end even if a newer one is loaded; 0: the worker looks the name up."""
    sources: bool = False
    """With `ngram`: whether the answer names the documents that its tokens were seen in."""

    @classmethod
    def of(cls, params: object) -> "MemoryChoice | None":
        """The choice in a request's SamplingParams (or pooling parameters, which have none); None: no domain was named."""
        extra = getattr(params, "extra_args", None)
        if not extra or extra.get(DOMAIN) is None:
            return None
        lam, stride, slot = float(extra.get(LAMBDA) or 0.0), int(extra.get(STRIDE) or 0), int(extra.get(SLOT) or 0)
        return cls(extra[MODE], extra[DOMAIN], lam, stride, bool(extra.get(OPEN)), slot, bool(extra.get(SOURCES)))

    def to_extra_args(self) -> dict[str, str | float | int]:
        """The entries to put into SamplingParams.extra_args."""
        entries: dict[str, str | float | int] = {
            MODE: self.mode, DOMAIN: self.domain, LAMBDA: self.lam, STRIDE: self.stride, OPEN: int(self.open_ended),
        }  # fmt: skip
        return entries | ({SOURCES: 1} if self.sources else {})

    @property
    def mixed(self) -> bool:
        """Whether a distribution is mixed into the base's.

        Lambda 0 is the base alone: it costs nothing, reads and fills the base's own cache blocks, and is exact.
        """
        return self.mode in MIXED and self.lam > 0

    @property
    def label(self) -> tuple[str, str]:
        """(mode, domain) label of the metrics; lambda 0 counts as mode `none`."""
        return (self.mode if self.mixed or self.mode == RAG else NONE), self.domain
