"""The model vLLM loads: an unchanged base, the memory towers beside it, and their mixture as logits.

Started on the base's own folder with the `hf_overrides` of a CompositeSpec (memdec.server.composite_spec).

Slots 1 to D are decoders, D + 1 to D + S datastores: kNN-LM needs no tower, its keys are the base's own hidden states. D is the
spec's capacity, which may be 0; slots without a decoder are empty until one is loaded into them (see memdec.server.model.slots).
Slots above are n-gram memories, which need the text before a row and nothing else.

Steps that are full CUDA graphs run all decoders as one (see memdec.server.model.stacked); with `stacked` in the spec every step does, for tests.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from vllm.compilation.backends import set_model_tag
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.logger import init_logger
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator
from vllm.model_executor.models.interfaces_base import VllmModelForTextGeneration
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.platforms import current_platform

from memdec.decoders.reading.retrieval import RetrievalPackage
from memdec.decoders.reading.tokenizer import trusted
from memdec.server.composite_spec import spec_of
from memdec.server.in_place import overwrite
from memdec.server.model.attention import share_attention
from memdec.server.model.mixing import mix
from memdec.server.model.ngrams import NgramMemories
from memdec.server.model.packing import pack, unpack
from memdec.server.model.replicated import replicated
from memdec.server.model.routing import Group, StepRouting, positions_by_slot
from memdec.server.model.stacked import StackedTower
from memdec.server.model.timing import StepTimes
from memdec.server.model.tower import Tower
from memdec.server.retrieval.knn import KnnMemory, log_probabilities
from memdec.server.routing.domains import NGRAM

logger = init_logger(f"vllm.{__name__}")  # vLLM sets up its own loggers alone


class MemoryDecoderForCausalLM(nn.Module):
    """Base plus memory decoders as one vLLM model. See the module's docstring for how it is configured."""

    base: VllmModelForTextGeneration

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        spec = spec_of(config)
        self.width = vllm_config.model_config.get_hidden_size()
        self.paths = [Path(entry.path) for entry in spec.decoders]
        self.base = init_vllm_registered_model(vllm_config, prefix=maybe_prefix(prefix, "base"), architectures=[spec.base_architecture])
        self.prefix, self.built, self.memory_width, self.memory_ids = prefix, 0, 0, 0
        towers = self._towers(vllm_config) if self.paths else []
        self.towers = nn.ModuleList([*towers, *[None] * (spec.capacity - len(towers))])  # type: ignore[list-item]
        self.always_stacked = spec.stacked
        self.stacked = self._stacked(vllm_config)
        """The tower that full CUDA graphs run; None without such graphs, or if a layer of the decoders can't be stacked."""
        self.graphs: dict[str, Callable[..., Tensor]] = {}
        """The CUDA graphs of "base" and "stacked", which are called instead of them (see `wrap`)."""
        self.stores = [KnnMemory(RetrievalPackage.read(Path(entry.path))) for entry in spec.datastores]
        self.ngrams = NgramMemories({spec.first_slots[NGRAM, entry.name]: entry.path for entry in spec.ngrams})
        self.times = StepTimes()

    def _towers(self, vllm_config: VllmConfig) -> list[nn.Module]:
        """Build the decoders of the start without their weights; all share the first one's attention layers."""
        self.memory_config = AutoConfig.from_pretrained(self.paths[0], trust_remote_code=trusted())
        text_config = self.memory_config.get_text_config()
        self.memory_width, self.memory_ids = text_config.hidden_size, text_config.vocab_size
        tower_config = self._tower_config(vllm_config, self.memory_config)
        self.later = uncompiled(tower_config)
        """Configuration of the decoders that are loaded at run time, uncompiled: compiling one would delay all requests."""
        towers: list[nn.Module] = [self._tower(tower_config) for _ in self.paths]
        share_attention(towers, vllm_config.compilation_config.static_forward_context)
        return towers

    def _tower(self, config: VllmConfig) -> Tower:
        """Build a decoder's model without its weights. Its attention layers are not shared yet.

        Its name is unique among layers and compiled code; it has no integer between dots, since vLLM takes that for the layer's number.
        """
        self.built += 1
        name = maybe_prefix(self.prefix, f"memory_{self.built - 1}")
        with replicated(), set_model_tag(name):
            return Tower(init_vllm_registered_model(config, prefix=name, hf_config=self.memory_config), self.memory_ids)

    def later_tower(self) -> Tower:
        """Build the model of a decoder that is loaded while the engine runs, without its weights."""
        return self._tower(self.later)

    def _stacked(self, vllm_config: VllmConfig) -> StackedTower | None:
        """The stacked tower, if steps may be full CUDA graphs. If the decoders can't be stacked, turn full graphs off and return None."""
        config = vllm_config.compilation_config
        mode = config.cudagraph_mode or CUDAGraphMode.NONE
        graphs = not current_platform.is_cpu() and mode.has_full_cudagraphs()
        if not len(self.towers) or not (graphs or self.always_stacked):
            return None
        most = vllm_config.scheduler_config.max_num_batched_tokens
        stacked = StackedTower(self.later_tower, self.towers[0], len(self.towers), most, self.memory_ids, config.static_forward_context)
        # The kernel multiplies float32 at a lower precision on CUDA.
        unfit = stacked.unfit or ("float32" if graphs and vllm_config.model_config.dtype == torch.float32 else None)
        if unfit is None:
            return stacked
        logger.warning("full CUDA graphs are off: decoders with %s can't be stacked", unfit)
        overwrite(config, "cudagraph_mode", CUDAGraphMode.PIECEWISE if mode.has_piecewise_cudagraphs() else CUDAGraphMode.NONE)
        return None

    def wrap(self, graph_of: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
        """Capture base and memories as two CUDA graphs, so that a step without memories replays the base's alone."""
        self.graphs["base"] = graph_of(self.base)
        if self.stacked is not None:
            self.graphs["stacked"] = graph_of(self.stacked)

    def replace_tower(self, slot: int, tower: nn.Module | None) -> None:
        """Put a complete tower into a slot, or empty it. The first tower stays until another takes its place: it owns the attention layers."""
        if tower is None and slot == 1:
            return
        self.towers[slot - 1] = tower  # type: ignore[assignment]

    def release(self, slot: int) -> None:
        """Unload what a slot holds."""
        if slot <= len(self.towers):
            self.replace_tower(slot, None)
        else:
            self.ngrams.unload(slot)

    def reserved_bytes(self) -> int:
        """Bytes that decoders in the empty slots would take. A stacked tower has allocated their weights: there it is one decoder, built before it is copied in."""
        if not len(self.towers):
            return 0
        size = sum(weight.nbytes for weight in self.towers[0].parameters())
        empty = sum(tower is None for tower in self.towers)
        return size * (min(empty, 1) if self.stacked is not None else empty)

    @staticmethod
    def _tower_config(vllm_config: VllmConfig, memory_config: PreTrainedConfig) -> VllmConfig:
        """The engine's config for the towers: not quantised, with the decoders' own sliding window or none.

        The copies are shallow: the register of attention layers stays the engine's own.
        """
        config = copy.copy(vllm_config)
        if not current_platform.is_cpu():  # compiled towers were not tried there
            config = uncompiled(config)
        overwrite(config, "quant_config", None)
        # Attention layers without a window of their own take this one, which vLLM has set to the base's.
        overwrite(config, "cache_config", copy.copy(vllm_config.cache_config))
        text_config = memory_config.get_text_config()
        kinds = getattr(text_config, "layer_types", None)  # vLLM's own rule: models of mixed kinds set each layer's window
        sliding = kinds is None or all(kind == "sliding_attention" for kind in kinds)
        overwrite(config.cache_config, "sliding_window", getattr(text_config, "sliding_window", None) if sliding else None)
        return config

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The base's embeddings, [tokens, H]; the towers embed for themselves."""
        embedded: Tensor = self.base.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: Tensor | None = None,
        routing: StepRouting | None = None,
        attention: Mapping[int, ForwardContext] | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Packed rows [tokens, H_base + H_memory + TAIL] (see memdec.server.model.packing); [tokens, H_base] where no request has a memory.

        `routing` comes from the runner adapter; without it (vLLM's own profiling) every token has slot 1 and lambda 0. `attention`
        maps each decoder's slot to the forward context of its tokens alone, where they aren't all there are. `known` are the decoders'
        hidden states of the tokens that need not run again, [routing.known, H_memory].
        """
        with self.times.part("base", positions.device):
            hidden: Tensor = self.graphs.get("base", self.base)(input_ids, positions, intermediate_tensors, inputs_embeds)
        if routing is None:
            routing = StepRouting.for_profiling(len(hidden), hidden.device)
        if not routing.uses_memory:
            return hidden  # as plain vLLM, at the same cost
        if decoded := [group for group in routing.groups if group.slot <= len(self.towers)]:
            with self.times.part("memory", positions.device):
                if self.stacked is not None and (routing.captured or self.always_stacked):
                    memory = self.graphs.get("stacked", self.stacked)(input_ids, positions, self.stacked.placed(routing.slots))
                else:
                    memory = self._memory(input_ids, positions, hidden, decoded, attention or {})
                    if known is not None:
                        memory.index_copy_(0, routing.known, known)
        else:  # datastores and n-grams need no tower
            memory = hidden.new_zeros(len(hidden), self.memory_width)
        return pack(hidden, memory, routing.tail)

    def _memory(
        self, input_ids: Tensor, positions: Tensor, base_hidden: Tensor, groups: list[Group], attention: Mapping[int, ForwardContext]
    ) -> Tensor:
        """Hidden states of each token's own decoder, [tokens, H_memory]; zeros where a token has none.

        Each decoder's tokens are selected once a step, and its tower runs them as a batch of their own. `base_hidden` [tokens, H] gives the
        number of tokens, dtype and device.
        """
        # The base may have more rows of padding, and a client may send their ids.
        input_ids = input_ids.clamp(max=self.memory_ids - 1)
        memory = base_hidden.new_zeros(len(base_hidden), self.memory_width)
        for group in groups:
            tower = self.towers[group.slot - 1]
            if group.tokens is None:
                hidden: Tensor = tower(input_ids, positions)
                return hidden
            if not len(group.tokens):  # the decoder has run all of them as drafts
                continue
            with override_forward_context(attention[group.slot]):
                own: Tensor = tower(input_ids.index_select(0, group.tokens), positions.index_select(0, group.tokens))
            memory.index_copy_(0, group.tokens, own)
        return memory

    def compute_logits(self, rows: Tensor) -> Tensor | None:
        """Mixed logits [n, V] float32 from `forward`'s rows [n, ...]; the base's own, untouched, where no row has a memory."""
        packed = rows.shape[1] > self.width
        hidden = rows[:, : self.width].contiguous() if packed else rows
        with self.times.part("base", rows.device):
            logits: Tensor | None = self.base.compute_logits(hidden)
        if logits is None or not packed:  # None: not the rank that gathers
            return logits
        _, memory, slots, lams = unpack(rows, self.width, max(self.ngrams.loaded, default=len(self.towers) + len(self.stores)))
        if self.stacked is not None and not self.stores and not self.ngrams.loaded:  # needs no synchronisation with the device
            with self.times.part("memory", rows.device):
                own = self.stacked.logits(memory, slots)
            with self.times.part("mixing", rows.device):
                return torch.where(lams[:, None] > 0, mix(logits, own, lams), logits.float())
        groups = positions_by_slot(torch.where(lams > 0, slots, 0).cpu(), rows.device)
        if not groups:
            return logits
        parts = (logits, hidden, memory, lams, rows)
        if len(groups) == 1 and len(groups[0][1]) == len(rows):  # no rows to select and scatter
            return self._mixed(groups[0][0], *parts)
        mixed = logits.float()
        for slot, index in groups:
            mixed[index] = self._mixed(slot, *(part[index] for part in parts))
        return mixed

    def _mixed(self, slot: int, logits: Tensor, hidden: Tensor, memory: Tensor, lams: Tensor, rows: Tensor) -> Tensor:
        """Mixed logits [n, V] float32 of the rows of one slot."""
        if slot > len(self.towers) + len(self.stores):
            return self.ngrams.mixed(slot, logits, lams, rows, self.times)
        own = self._memory_logits(slot, hidden, memory, logits.shape[-1])
        if any(besides := self.ngrams.besides(rows)):
            return self.ngrams.mixed_beside(besides, logits, own, lams, rows, self.times)
        with self.times.part("mixing", hidden.device):
            return mix(logits, own, lams)

    def _memory_logits(self, slot: int, hidden: Tensor, memory: Tensor, vocabulary: int) -> Tensor:
        """The memory's logits [n, V] for the rows of one slot: its decoder's logits, or its datastore's log-probabilities."""
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

        Returns the names of the loaded parameters, which vLLM compares with all parameters; None if some model returns none.
        """
        loaded = {"base": self.base.load_weights(finite(weights, "base"))}
        towers: Iterable[Any] = self.towers
        for i, (tower, path) in enumerate(zip(towers, self.paths, strict=False)):  # slots without a path are empty
            files = [str(f) for f in sorted(path.glob("*.safetensors"))]
            loaded[f"towers.{i}"] = tower.load_weights(finite(safetensors_weights_iterator(files, use_tqdm_on_load=False), str(path)))
            if self.stacked is not None:
                self.stacked.adopt(i + 1, tower)
        if any(names is None for names in loaded.values()):
            return None
        return {f"{part}.{name}" for part, names in loaded.items() for name in names}


def uncompiled(config: VllmConfig) -> VllmConfig:
    """A copy of a configuration, for a model that runs eagerly."""
    eager = copy.copy(config)
    overwrite(eager, "compilation_config", copy.copy(config.compilation_config))
    overwrite(eager.compilation_config, "mode", CompilationMode.NONE)
    overwrite(eager.compilation_config, "custom_ops", ["all"])
    return eager


def finite(weights: Iterable[tuple[str, Tensor]], source: str) -> Iterator[tuple[str, Tensor]]:
    """Pass weights through; raise ValueError at the first that holds NaN or infinity."""
    for name, tensor in weights:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: weight {name} holds NaN or infinity")
        yield name, tensor
