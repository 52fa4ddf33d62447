"""The class that vLLM's model registry knows: the composite, and which ModelState its V2 runner gives it."""

from memdec.server.model.composite import MemoryDecoderForCausalLM as Composite
from memdec.server.worker.v2 import MemoryModelState


class MemoryDecoderForCausalLM(Composite):
    """The composite as vLLM loads it; its V1 runner is subclassed instead (memdec.server.worker.v1)."""

    @staticmethod
    def get_model_state_cls() -> type:
        """The ModelState, for which vLLM's V2 runner asks a model."""
        return MemoryModelState
