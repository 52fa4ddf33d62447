"""Entry point `vllm.general_plugins`: tells each vLLM process that our architecture exists."""

from vllm import ModelRegistry

ARCHITECTURE = "MemoryDecoderForCausalLM"


def register() -> None:
    """Register the composite by name; vLLM imports it only in the worker. Runs once a process, and again does no harm."""
    ModelRegistry.register_model(ARCHITECTURE, "server.model.composite:MemoryDecoderForCausalLM")
