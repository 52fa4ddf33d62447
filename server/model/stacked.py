"""All decoders as one tower whose layers pick each token's weights on the device, so that a step can be one CUDA graph.

Elsewhere each decoder's tokens are a batch of their own (see memdec.server.model.composite), and which decoders those are is decided in Python: a captured
graph can't follow. Here the weights of all slots lie in one tensor a layer, [slots, ...], and a decoder's own parameters are views of it. Tokens
are sorted by slot once a step, on the device, and each matrix product is vLLM's kernel for mixtures of experts, with the slots as experts.
A slot that no token has is not read, and rows without a decoder come out as zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.layernorm import LayerNorm, RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.triton_utils import HAS_TRITON

from memdec.server.in_place import overwrite
from memdec.server.model.attention import share_attention
from memdec.server.model.tower import LogitBias, Tower

FEW = 4  # tokens up to which each is a block of its own: cheaper than to sort them
NONE = -1


@dataclass(frozen=True)
class Blocks:
    """A step's tokens, sorted by decoder, in blocks of one decoder each, as the kernel reads them. Built without synchronising with the device."""

    experts: Tensor
    """Decoder of each token, slot - 1, [tokens] int64; NONE where there is none."""
    size: int
    """Tokens a block."""
    order: Tensor | None
    """Token of each place in the blocks, int32, `tokens` where a place is empty; None: each token is a block."""
    owners: Tensor
    """Decoder of each block, int32; NONE: zeros are written."""
    used: Tensor
    """Places in use, [1] int32."""

    @classmethod
    def of(cls, slots: Tensor, decoders: int, size: int) -> "Blocks":
        """Sort tokens by their slots [tokens] int64. Slots 1 to `decoders` have a decoder; tokens of any other value have none."""
        count = len(slots)
        experts = torch.where((slots > 0) & (slots <= decoders), slots - 1, NONE)
        if count <= FEW:
            return cls(experts, size, None, experts.int(), torch.full((1,), count * size, dtype=torch.int32, device=slots.device))
        kinds = torch.arange(NONE, decoders, device=slots.device)
        ordered, tokens = experts.sort(stable=True)
        counts = (experts[:, None] == kinds).sum(0)
        ends = ((counts + size - 1) // size).cumsum(0)  # of each kind's blocks
        first = torch.cat([ends.new_zeros(1), ends[:-1]]) * size  # place of each kind's first token
        rank = torch.arange(count, device=slots.device) - (counts.cumsum(0) - counts)[ordered + 1]
        most = count // size + min(count, decoders + 1)
        order = torch.full((most * size,), count, dtype=torch.int32, device=slots.device)
        order.scatter_(0, first[ordered + 1] + rank, tokens.int())
        kind = torch.searchsorted(ends, torch.arange(most, device=slots.device), right=True)
        return cls(experts, size, order, (kind.clamp(max=decoders) - 1).int(), (ends[-1:] * size).int())


class StackedTower:
    """The decoders' architecture once, without weights of its own, over the stacked weights of all slots."""

    def __init__(
        self, build: Callable[[], Tower], first: nn.Module, slots: int, tokens: int, ids: int, registered: dict[str, object]
    ) -> None:
        """`build` makes a tower; `first` is one whose attention layers are shared, `registered` vLLM's register of those.

        A step has at most `tokens` tokens. Token ids from `ids` on have no embedding in the decoders.
        """
        with torch.device("meta"):
            self.model = build()
        share_attention([first, self.model], registered)
        self.slots, self.ids = slots, ids
        self.places = torch.zeros(tokens, dtype=torch.int64)
        """The buffer from which CUDA graphs read the step's slots, [tokens] int64."""
        self.weights: dict[str, Tensor] = {}
        """Parameter's name -> [slots, ...]."""
        self.blocks: Blocks
        """The blocks of the step, or of the rows of logits, that is being computed."""
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        self.unfit = next((name for name, buffer in self.model.named_buffers() if buffer.is_meta), None)
        """The class of a layer, or the name of a buffer, that can't be stacked; None if all can. Otherwise this tower must not be used."""
        for path, layer in list(self.model.named_modules()):
            own = {leaf: names[id(weight)] for leaf, weight in layer.named_parameters(recurse=False)}
            if not own:
                continue
            if isinstance(layer, LinearBase | VocabParallelEmbedding):
                overwrite(layer, "quant_method", PickedProduct(self, own["weight"], own.get("bias")))
            elif type(layer) in PICKED:
                parent, _, child = path.rpartition(".")
                setattr(self.model.get_submodule(parent), child, PICKED[type(layer)](self, layer, own))
            else:
                self.unfit = type(layer).__name__
                return

    def adopt(self, slot: int, tower: nn.Module) -> None:
        """Copy a tower's weights [...] into the stack and make its parameters views of it. The slot must not be in use."""
        for name, weight in tower.named_parameters():
            if name not in self.weights:
                self.weights[name] = weight.new_zeros(self.slots, *weight.shape)
            own = self.weights[name][slot - 1]
            own.copy_(weight.data)
            weight.data = own

    def placed(self, slots: Tensor) -> Tensor:
        """Copy the step's slots [tokens] int64 into the buffer that CUDA graphs read; returns its first `tokens` entries."""
        return self.places[: len(slots)].copy_(slots)

    def __call__(self, input_ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """Hidden states of each token's own decoder, [tokens, H_memory]; undefined where a token has none."""
        self.blocks = self._blocks(slots)
        hidden: Tensor = self.model(input_ids.clamp(max=self.ids - 1), positions)
        return hidden

    def logits(self, hidden: Tensor, slots: Tensor) -> Tensor:
        """Each row's own decoder's logits, [n, V]."""
        self.blocks = self._blocks(slots)
        logits: Tensor = self.model.compute_logits(hidden)
        return logits

    def _blocks(self, slots: Tensor) -> Blocks:
        return Blocks.of(slots, self.slots, block_size(len(slots), self.slots))

    def pick(self, name: str, x: Tensor) -> Tensor:
        """Each token's own weight as [tokens, 1..., width], which broadcasts with x [tokens, ..., width]."""
        own = self.weights[name].index_select(0, self.blocks.experts.clamp(min=0))
        return own.view(len(own), *[1] * (x.dim() - own.dim()), *own.shape[1:])


class PickedProduct(QuantizeMethodBase):
    """The quantisation method of linear layers and embeddings that multiplies each token by its own decoder's weights."""

    def __init__(self, tower: StackedTower, weight: str, bias: str | None) -> None:
        self.tower, self.weight, self.bias = tower, weight, bias

    def create_weights(self, *_: object, **__: object) -> None:
        """Create nothing: the layer's weights were created by its first method."""

    def apply(self, _layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x [tokens, K] -> [tokens, N]."""
        added = self.tower.weights[self.bias] if bias is not None and self.bias is not None else None
        return multiply(x, self.tower.weights[self.weight], added, self.tower.blocks)

    def embedding(self, _layer: nn.Module, ids: Tensor) -> Tensor:  # type: ignore[override]
        """ids [tokens] -> [tokens, H]."""
        return looked_up(self.tower, self.weight, ids)


class PickedEmbedding(nn.Module):
    """An nn.Embedding, as learned positions use it, of each token's own decoder."""

    def __init__(self, tower: StackedTower, _layer: nn.Module, own: dict[str, str]) -> None:
        super().__init__()
        self.tower, self.own = tower, own

    def forward(self, ids: Tensor) -> Tensor:
        """ids [tokens] -> [tokens, H]."""
        return looked_up(self.tower, self.own["weight"], ids)


class PickedRMSNorm(nn.Module):
    """vLLM's RMSNorm without its weight, times the weight of each token's own decoder."""

    def __init__(self, tower: StackedTower, layer: RMSNorm, own: dict[str, str]) -> None:
        super().__init__()
        overwrite(layer, "pass_weight", False)
        overwrite(layer, "pass_weight_add", False)
        self.plain, self.tower, self.own = layer, tower, own
        self.variance_epsilon = layer.variance_epsilon

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x [tokens, ..., width]; with a residual both are returned."""
        weight = self.tower.pick(self.own["weight"], x)
        if residual is None:
            normed: Tensor = self.plain(x)
            return normed * weight
        normed, residual = self.plain(x, residual)
        return normed * weight, residual


class PickedLayerNorm(nn.Module):
    """LayerNorm without weight and bias, then weight and bias of each token's own decoder."""

    def __init__(self, tower: StackedTower, layer: LayerNorm | nn.LayerNorm, own: dict[str, str]) -> None:
        super().__init__()
        self.tower, self.own, self.eps, self.shape = tower, own, layer.eps, layer.normalized_shape

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, ..., width]."""
        normed = functional.layer_norm(x.float(), self.shape, None, None, self.eps)
        if "weight" in self.own:
            normed = normed * self.tower.pick(self.own["weight"], x)
        if "bias" in self.own:
            normed = normed + self.tower.pick(self.own["bias"], x)
        return normed.to(x.dtype)


class PickedLogitBias(nn.Module):
    """The bias on each row's own decoder's logits."""

    def __init__(self, tower: StackedTower, _layer: nn.Module, own: dict[str, str]) -> None:
        super().__init__()
        self.tower, self.own = tower, own

    def forward(self, logits: Tensor) -> Tensor:
        """Logits [n, V]."""
        return logits + self.tower.pick(self.own["weight"], logits)


PICKED: dict[type, Callable[..., nn.Module]] = {
    RMSNorm: PickedRMSNorm,
    LayerNorm: PickedLayerNorm,
    nn.LayerNorm: PickedLayerNorm,
    nn.Embedding: PickedEmbedding,
    LogitBias: PickedLogitBias,
}


def looked_up(tower: StackedTower, name: str, ids: Tensor) -> Tensor:
    """Embeddings [tokens, H] of ids [tokens], each from its own decoder's table."""
    table = tower.weights[name]
    return functional.embedding(ids + tower.blocks.experts.clamp(min=0) * table.shape[1], table.flatten(0, 1))


def block_size(tokens: int, decoders: int) -> int:
    """Tokens in a block: vLLM's default for its kernel with so many tokens and decoders."""
    return _config(tokens, decoders, 1, 1)["BLOCK_SIZE_M"] if HAS_TRITON else 16


def _config(tokens: int, decoders: int, outputs: int, inputs: int) -> dict[str, int]:
    from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config

    config: dict[str, int] = get_default_config(tokens, decoders, outputs, inputs, 1, None)
    return config


def multiply(x: Tensor, weights: Tensor, bias: Tensor | None, blocks: Blocks) -> Tensor:
    """x [tokens, K] times each token's own of weights [decoders, N, K], plus its bias [decoders, N]: [tokens, N]; zeros where there is none."""
    return _by_kernel(x, weights, bias, blocks) if HAS_TRITON else by_row(x, weights, bias, blocks)


def by_row(x: Tensor, weights: Tensor, bias: Tensor | None, blocks: Blocks) -> Tensor:
    """`multiply` without Triton. It copies a weight matrix for each token; tests compare the kernel with it."""
    own = blocks.experts.clamp(min=0)
    result = torch.bmm(weights.index_select(0, own), x[:, :, None]).squeeze(-1)
    if bias is not None:
        result = result + bias.index_select(0, own)
    return torch.where((blocks.experts >= 0)[:, None], result, 0)


def _by_kernel(x: Tensor, weights: Tensor, bias: Tensor | None, blocks: Blocks) -> Tensor:
    from vllm.model_executor.layers.fused_moe.fused_moe import invoke_fused_moe_triton_kernel
    from vllm.triton_utils import tl

    decoders, outputs, inputs = weights.shape
    result = x.new_empty(len(x), 1, outputs)
    kinds = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    invoke_fused_moe_triton_kernel(
        A=x.contiguous(), B=weights, C=result, A_scale=None, B_scale=None, topk_weights=None,
        sorted_token_ids=blocks.order, expert_ids=blocks.owners, num_tokens_post_padded=blocks.used, mul_routed_weight=False, top_k=1,
        config={**_config(len(x), decoders, outputs, inputs), "BLOCK_SIZE_M": blocks.size}, compute_type=kinds[x.dtype],
        use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False, per_channel_quant=False, B_bias=bias,
    )  # fmt: skip
    return result.squeeze(1)
