"""The engine process: the composite, which vLLM loads."""

from memdec.server.seams.seam import LOUD, STARTS, USED, Kind, Seam

LOADER = "vllm.model_executor.model_loader.utils"
MOE = "vllm.model_executor.layers.fused_moe.fused_moe"
STACKED = ("model/stacked.py",)
ADAPTERS = "a kernel of vLLM's for many full-weight adapters"
LINEAR = "vllm.model_executor.layers.linear"
GROUP = "layers take their tensor-parallel group as an argument"

SEAMS = (
    Seam("vllm.model_executor.models.utils:init_vllm_registered_model", Kind.READ, ("model/composite.py",), "base and towers are built by their architectures", STARTS, "never", accepts=("vllm_config", "prefix", "hf_config", "architectures")),
    Seam("vllm.model_executor.models.utils:extract_layer_index", Kind.NAME, ("model/composite.py",), "a tower's name has no integer between dots but its layers' numbers", STARTS, "never", parameters=("layer_name",)),
    Seam(f"{LOADER}:process_weights_after_loading", Kind.READ, ("model/slots.py",), "what a decoder loaded at run time must go through too; the model's own part is last", "silently: weights in the wrong form", "a function that does it for one module",
         source=("quant_method.process_weights_after_loading(module)",), in_order=("named_modules", "model.process_weights_after_loading()")),
    Seam(f"{LOADER}:device_loading_context", Kind.READ, ("model/slots.py",), "the same", LOUD, "as above", parameters=("module", "target_device"), complete=True),
    Seam("vllm.config.compilation:CompilationConfig", Kind.READ, ("model/composite.py", "model/slots.py", "model/attention.py"), "static_forward_context, the register of layers with a KV cache: the towers share the first one's", STARTS, "models may share attention layers", has=("static_forward_context",)),
    Seam("vllm.config.compilation:CompilationConfig", Kind.WRITE, ("model/composite.py",), "mode, custom_ops and cudagraph_mode: towers that run eagerly, and no full graphs where decoders can't be stacked", STARTS, "never", has=("mode", "custom_ops", "cudagraph_mode")),
    Seam("vllm.config:CacheConfig", Kind.WRITE, ("model/composite.py",), "sliding_window: the towers' own", STARTS, "attention layers take their window from their model's configuration alone", has=("sliding_window",)),
    Seam("vllm.model_executor.layers.attention_layer_base:AttentionLayerBase", Kind.READ, ("model/attention.py",), "what has a KV cache", STARTS, "models may share attention layers"),
    Seam("vllm.logger:init_logger", Kind.NAME, ("model/composite.py",), "loggers are set up by vLLM under the name vllm alone", "silently: our warnings would not be shown", "vLLM sets the root logger up", parameters=("name",)),
    Seam("vllm.logger:DEFAULT_LOGGING_CONFIG", Kind.NAME, ("model/composite.py",), "the same", "silently", "as above"),
    Seam("vllm.distributed.parallel_state:get_tp_group", Kind.READ, ("model/replicated.py",), "returns _TP, which we replace", LOUD, GROUP, source=("return _TP",)),
    Seam("vllm.distributed.parallel_state:", Kind.WRITE, ("model/replicated.py",), "_TP: towers are built whole on every rank of a sharded base", STARTS, GROUP, has=("_TP", "get_pp_group")),
    # Stacked decoders.
    *(
        Seam(f"{LINEAR}:{name}.forward", Kind.READ, STACKED, "asks quant_method for its product", "silently: a weight on the meta device is used, which fails at the first step", ADAPTERS, source=("self.quant_method.apply(self, ",))
        for name in ("ReplicatedLinear", "ColumnParallelLinear", "RowParallelLinear")
    ),
    Seam(f"{LINEAR}:LinearBase", Kind.WRITE, STACKED, "quant_method: ours, which picks each token's weights", STARTS, ADAPTERS, source=("self.quant_method",)),
    Seam("vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding.forward", Kind.READ, STACKED, "asks it for embeddings", "as above", ADAPTERS, source=("self.quant_method.embedding(self, ",)),
    Seam("vllm.model_executor.layers.logits_processor:LogitsProcessor", Kind.READ, STACKED, "asks it for logits", "as above", ADAPTERS, source=("lm_head.quant_method.apply(",)),
    *(
        Seam(f"vllm.model_executor.layers.quantization.base_config:QuantizeMethodBase.{name}", Kind.OVERRIDE, STACKED, "our product by picked weights", LOUD, ADAPTERS, parameters=("self", "layer"))
        for name in ("create_weights", "apply", "embedding")
    ),
    Seam("vllm.model_executor.layers.layernorm:RMSNorm.forward_native", Kind.WRITE, STACKED, "pass_weight and pass_weight_add: without its weight, which each token has of its own", STARTS, ADAPTERS, source=("self.pass_weight_add",)),
    Seam("vllm.model_executor.layers.layernorm:RMSNorm.__init__", Kind.WRITE, STACKED, "the same", STARTS, ADAPTERS, source=("self.pass_weight =",)),
    Seam("vllm.model_executor.layers.layernorm:RMSNorm.forward_cuda", Kind.READ, STACKED, "obeys the same", "silently: wrong norms in graphs; the GPU tests see it", ADAPTERS, source=("self.pass_weight",)),
    Seam(f"{MOE}:get_default_config", Kind.READ, STACKED, "sizes of blocks for the kernel", USED, ADAPTERS, parameters=("M", "E", "N", "K", "topk", "dtype")),
    Seam(f"{MOE}:", Kind.READ, STACKED, "the kernel writes zeros for experts of -1", "silently: rows without a decoder would not be zeros", ADAPTERS, source=("off_experts == -1",)),
    Seam(f"{MOE}:invoke_fused_moe_triton_kernel", Kind.READ, STACKED, "the kernel for mixtures of experts, with slots for experts", USED, ADAPTERS, accepts=("sorted_token_ids", "expert_ids", "num_tokens_post_padded", "B_bias")),
)  # fmt: skip
