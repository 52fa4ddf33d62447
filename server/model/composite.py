"""The model vLLM loads: an unchanged base, the memory towers beside it, and their mixture as logits.

Started on the base's own folder with
    hf_overrides={"architectures": ["MemoryDecoderForCausalLM"],
                  "memory_decoder": {"base_architecture": ..., "decoders": [{"name": ..., "path": ..., "lambda": ...}, ...],
                                     "datastores": [{"name": ..., "path": ...}, ...]}}

Slots 1 to D are decoders, D + 1 to D + S datastores: kNN-LM needs no tower, its keys are the base's own hidden states.
"""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from vllm.config import CompilationMode, VllmConfig
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

from decoders.retrieval import RetrievalPackage
from decoders.tokenizer import trusted
from server.model.mixing import mix
from server.model.packing import pack, unpack
from server.model.routed import CurrentStep, routed_view, share_attention
from server.model.routing import StepRouting, group
from server.model.timing import StepTimes
from server.retrieval.knn import KnnMemory, log_probabilities


class MemoryDecoderForCausalLM(nn.Module):
    """Base plus memory decoders as one vLLM model. See the module's docstring for how it is configured."""

    base: Any  # any vLLM model

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        spec: dict[str, Any] = config.memory_decoder
        self.width = vllm_config.model_config.get_hidden_size()
        self.paths = [Path(d["path"]) for d in spec["decoders"]]
        self.base = init_vllm_registered_model(vllm_config, prefix=maybe_prefix(prefix, "base"), architectures=[spec["base_architecture"]])
        memory_config = AutoConfig.from_pretrained(self.paths[0], trust_remote_code=trusted())
        beside = self._tower_config(vllm_config, memory_config)
        text_config = memory_config.get_text_config()
        self.memory_width, self.memory_ids = text_config.hidden_size, text_config.vocab_size
        self.towers = nn.ModuleList(
            # vLLM reads the layer number off the only integer between dots.
            init_vllm_registered_model(beside, prefix=maybe_prefix(prefix, f"memory_{i}"), hf_config=memory_config)
            for i in range(len(self.paths))
        )
        share_attention(list(self.towers), vllm_config.compilation_config.static_forward_context)
        self.stores = [KnnMemory(RetrievalPackage.read(Path(d["path"]))) for d in spec.get("datastores", [])]
        self.times = StepTimes()
        self.step = CurrentStep()
        # Not a registered child: it owns no weights, and vLLM must not post-process them twice.
        self.__dict__["view"] = None

    @staticmethod
    def _tower_config(vllm_config: VllmConfig, memory_config: PreTrainedConfig) -> VllmConfig:
        """The engine's config for the towers: run eagerly, not quantised, with the decoders' own sliding window or none.

        vLLM compiles a model once and drops the guards, so what is routed by Python values must not be compiled. The copies are
        shallow: the register of attention layers stays the engine's own.
        """
        beside = copy.copy(vllm_config)
        beside.compilation_config = copy.copy(vllm_config.compilation_config)
        beside.compilation_config.mode = CompilationMode.NONE
        beside.compilation_config.custom_ops = ["all"]
        beside.quant_config = None
        # Attention layers that aren't told otherwise take the window from here, where vLLM has put the base's.
        beside.cache_config = copy.copy(vllm_config.cache_config)
        text_config = memory_config.get_text_config()
        kinds = getattr(text_config, "layer_types", None)  # vLLM's own rule: models of mixed kinds tell each layer themselves
        sliding = kinds is None or all(kind == "sliding_attention" for kind in kinds)
        beside.cache_config.sliding_window = getattr(text_config, "sliding_window", None) if sliding else None
        return beside

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The base's embeddings, [tokens, H]; the towers embed for themselves."""
        embedded: Tensor = self.base.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        routing: StepRouting | None = None,
    ) -> Tensor:
        """Packed rows [tokens, H_base + H_memory + TAIL] (see server.model.packing); [tokens, H_base] where no request has a memory.

        `routing` comes from the runner adapter; without it (vLLM's own profiling) every token has slot 1 and lambda 0.
        """
        with self.times.part("base", positions.device):
            hidden = self.base(input_ids, positions, intermediate_tensors, inputs_embeds)
        if routing is None:
            slots = torch.ones(len(hidden), dtype=torch.int64)
            routing = StepRouting(slots.to(hidden.device), torch.zeros(len(hidden), device=hidden.device), group(slots, hidden.device))
        if not routing.uses_memory:
            alone: Tensor = hidden  # what vLLM does without us, at no more cost
            return alone
        towers = routing.up_to(len(self.towers))
        if not towers.groups:
            memory = hidden.new_zeros(len(hidden), self.memory_width)
        else:
            with self.times.part("memory", positions.device):
                memory = self._memory(input_ids, positions, towers)
        return pack(hidden, memory, routing.slots, routing.lams)

    def _memory(self, input_ids: Tensor, positions: Tensor, routing: StepRouting) -> Tensor:
        """Hidden states of each token's own decoder, [tokens, H_memory]; anything where a token has none."""
        # The base may have more rows of padding, and a client may send their ids.
        input_ids = input_ids.clamp(max=self.memory_ids - 1)
        if (only := routing.only) is not None:
            hidden: Tensor = self.towers[only - 1](input_ids, positions)
            return hidden
        self.step.routing = routing
        routed: Tensor = self.__dict__["view"](input_ids, positions)
        return routed

    def compute_logits(self, rows: Tensor) -> Tensor | None:
        """Mixed logits [n, V] float32 from `forward`'s rows [n, ...]; the base's own, untouched, where no row has a memory."""
        packed = rows.shape[1] > self.width
        hidden = rows[:, : self.width].contiguous() if packed else rows
        with self.times.part("base", rows.device):
            logits: Tensor | None = self.base.compute_logits(hidden)
        if logits is None or not packed:  # None: not the rank that gathers
            return logits
        _, memory, slots, lams = unpack(rows, self.width, len(self.towers) + len(self.stores))
        groups = group(torch.where(lams > 0, slots, 0).cpu(), rows.device)
        if not groups:
            return logits
        if len(groups) == 1 and len(groups[0][1]) == len(rows):  # nothing to pick out and put back
            return self._mixed(groups[0][0], logits, hidden, memory, lams)
        mixed = logits.float()
        for slot, index in groups:
            mixed[index] = self._mixed(slot, logits[index], hidden[index], memory[index], lams[index])
        return mixed

    def _mixed(self, slot: int, logits: Tensor, hidden: Tensor, memory: Tensor, lams: Tensor) -> Tensor:
        """A slot's rows [n, ...] mixed."""
        own = self._memory_logits(slot, hidden, memory, logits.shape[-1])
        with self.times.part("mixing", hidden.device):
            return mix(logits, own, lams)

    def _memory_logits(self, slot: int, hidden: Tensor, memory: Tensor, vocabulary: int) -> Tensor:
        """What is mixed into a slot's rows [n, ...]: its decoder's logits, or its datastore's log-probabilities."""
        if slot <= len(self.towers):
            tower: Any = self.towers[slot - 1]
            with self.times.part("memory", hidden.device):
                logits: Tensor = tower.compute_logits(memory)
            return logits
        with self.times.part("search", hidden.device):
            tokens, weights = self.stores[slot - len(self.towers) - 1].search(hidden)
            return log_probabilities(tokens, weights, vocabulary)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        """Load the base from vLLM's iterator and every tower from its own folder.

        Returns the names that were set, which vLLM compares with all there are; None if some model doesn't say.
        """
        loaded = {"base": self.base.load_weights(finite(weights, "base"))}
        towers: Iterable[Any] = self.towers
        for i, (tower, path) in enumerate(zip(towers, self.paths, strict=True)):
            files = [str(f) for f in sorted(path.glob("*.safetensors"))]
            loaded[f"towers.{i}"] = tower.load_weights(finite(safetensors_weights_iterator(files, use_tqdm_on_load=False), str(path)))
        if any(names is None for names in loaded.values()):
            return None
        return {f"{part}.{name}" for part, names in loaded.items() for name in names}

    def process_weights_after_loading(self) -> None:
        """The last thing vLLM calls when loading: the towers' layers are final now, so the routed view can be laid over them."""
        self.__dict__["view"] = routed_view(list(self.towers), self.step)


def finite(weights: Iterable[tuple[str, Tensor]], source: str) -> Iterator[tuple[str, Tensor]]:
    """Pass weights through; raise ValueError at the first that holds NaN or infinity."""
    for name, tensor in weights:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: weight {name} holds NaN or infinity")
        yield name, tensor
