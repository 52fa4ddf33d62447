"""The engine process: self-speculation, which is the V1 runner's."""

from memdec.server.seams.seam import STARTS, USED, Kind, Seam

V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
DRAFTER = ("worker/drafter.py",)
PROPOSER = "vLLM's custom proposers may hand over probabilities, reserve slots and say which sampling parameters they take"
SLOWER = "silently: slower, with the same answers"

SEAMS = (
    Seam(V1, Kind.NAME, DRAFTER, "makes a proposer of method custom_class, and asks it for drafts", STARTS, PROPOSER, source=("self.drafter = create_custom_proposer(", "self.drafter).propose(")),
    Seam(f"{V1}._get_spec_decode_draft_probs", Kind.WRITE, DRAFTER, "_draft_probs and _draft_prob_req_ids: the drafts' probabilities, for vLLM's rejection sampler", "loudly, at the first sampled draft", PROPOSER,
         source=("self._draft_probs[row_idx, :num_draft]", "self._draft_prob_req_ids")),
    Seam(f"{V1}._sample", Kind.OVERRIDE, ("worker/v1.py", "worker/seeds.py"), "a step without drafts samples as without speculation, and seeds are put back (see _bookkeeping_sync)", SLOWER, "vLLM does so itself", parameters=("self", "logits", "spec_decode_metadata"), complete=True),
    Seam(f"{V1}._calc_spec_decode_metadata", Kind.OVERRIDE, ("worker/v1.py",), "the same for what is to be verified", SLOWER, "vLLM does so itself", parameters=("self", "num_draft_tokens", "cu_num_scheduled_tokens")),
    Seam("vllm.v1.spec_decode.metadata:SpecDecodeMetadata", Kind.READ, ("worker/v1.py",), "made empty", USED, "vLLM does so itself", accepts=("num_draft_tokens", "logits_indices"), source=("self.max_spec_len",)),
    Seam(f"{V1}._input_fits_in_drafter", Kind.OVERRIDE, ("worker/v1.py",), "the drafter bounds each request itself; vLLM would stop for all near one's end", SLOWER, "vLLM decides by request", parameters=("self", "common_attn_metadata"), complete=True),
    Seam("vllm.v1.core.sched.scheduler:Scheduler", Kind.WRITE, DRAFTER, "num_lookahead_tokens: slots in the KV cache for what is being drafted", STARTS, PROPOSER, source=("num_lookahead_tokens=self.num_lookahead_tokens", "self.num_spec_tokens =")),
    Seam("vllm.v1.sample.logits_processor:build_logitsprocs", Kind.READ, ("worker/v1.py",), "min_p and logit_bias also with speculation", STARTS, PROPOSER, parameters=("vllm_config", "device", "is_pin_memory", "is_pooling_model")),
    Seam("vllm.v1.worker.gpu_input_batch:InputBatch.__init__", Kind.WRITE, ("worker/v1.py",), "logitsprocs: those", STARTS, PROPOSER, source=("self.logitsprocs = logitsprocs",)),
    Seam("vllm.config:VllmConfig", Kind.WRITE, ("worker/v1.py", "model/composite.py"), "copies of the engine's configuration, changed: speculative_config, quant_config, cache_config, compilation_config", STARTS, "never",
         has=("speculative_config", "quant_config", "cache_config", "compilation_config")),
    Seam("vllm.v1.sample.rejection_sampler:expand_kernel", Kind.FAULT, ("worker/expand.py",), "vLLM's stand-in for CPUs rounds temperatures and writes into a copy", "silently: wrong samples with drafts on a CPU", "the stand-in is mended"),
    Seam("vllm.triton_utils.dispatcher:KernelOverride", Kind.WRITE, ("worker/expand.py",), "_impl: ours in its place", STARTS, "as above", source=("self._impl = impl", "return self._impl(*args, **kwargs)")),
)  # fmt: skip
