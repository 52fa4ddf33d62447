"""What the rest of the front end uses of the engine client, and what we use of objects that vLLM hands us, so that it is checked.

mypy doesn't follow vLLM's source: its classes, and MemoryEngine as far as it is an AsyncLLM, have no types there.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from memdec.server.engine.liveness import Liveness
from memdec.server.engine.loaded_domains import LoadedDomains
from memdec.server.metrics import Timings


class HoldsTimings(Protocol):
    """A TimedOutputProcessor."""

    timings: Timings


class Engine(Protocol):
    """A MemoryEngine, as domain updates, baseline replays and routes use it."""

    loaded: LoadedDomains
    liveness: Liveness
    draining: bool
    """Whether the server shuts down: no new work."""

    @property
    def errored(self) -> bool:
        """Whether the engine process has died."""

    @property
    def output_processor(self) -> HoldsTimings:
        """It measures each domain."""

    def generate(
        self, prompt: Mapping[str, object], sampling_params: object, request_id: str, *, priority: int = 0
    ) -> AsyncGenerator[object, None]:
        """Outputs of one request."""

    async def everywhere(self, method: str, *args: object) -> list[list[object]]:
        """Call a method on every worker, between two steps: for each replica, each rank's answer."""

    def uses(self, slot: int) -> bool:
        """Whether an unfinished request uses this slot."""


class AddedToken(Protocol):
    """A token that was added to a vocabulary."""

    @property
    def special(self) -> bool:
        """Whether generated text leaves it out."""


class Vocabulary(Protocol):
    """A tokenizer of vLLM's, where tokens are only turned into bytes."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """The vocabulary's entry of each token."""


class Tokenizer(Vocabulary, Protocol):
    """A tokenizer of vLLM's, where it also says which tokens generated text leaves out."""

    @property
    def all_special_ids(self) -> Sequence[int]:
        """Ids of special tokens."""

    def __hash__(self) -> int: ...
