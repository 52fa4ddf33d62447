"""The engine process: workers, runners, attention of a part of a step, fair shares."""

from memdec.server.seams.seam import LOUD, STARTS, USED, Kind, Seam

V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
STATE = "vllm.v1.worker.gpu.model_states.default:DefaultModelState"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
FAIR = ("worker/fair.py",)
CONTEXTS = ("worker/forward_contexts.py",)
ONE_RUNNER = "the V1 runner is gone: the V2 runner needs no runner of ours"
HOOK = "the scheduler asks a hook which requests may take part in a step"
METADATA = "vLLM builds attention metadata for some of a step's requests"
V2_USE = "never: a model's own ModelState is vLLM's official interface (see get_model_state_cls)"

SEAMS = (
    # V1: the runner is a subclass, which the workers build.
    Seam("vllm.v1.worker.cpu_worker:CPUWorker.init_device", Kind.OVERRIDE, ("worker/v1.py", "worker/seeds.py"), "builds its runner by a module-level name, in whose place ours stands meanwhile", STARTS, f"a method like the CUDA worker's; or {ONE_RUNNER}",
         parameters=("self",), complete=True, source=("self.model_runner = CPUModelRunner(self.vllm_config",)),
    Seam("vllm.v1.worker.cpu_worker:CPUModelRunner", Kind.WRITE, ("worker/v1.py", "worker/seeds.py"), "that name", STARTS, "as above"),
    Seam(f"{V1}._bookkeeping_sync", Kind.OVERRIDE, ("worker/seeds.py",), "takes back what a seeded request drew for a discarded token by an offset that generators of CPUs don't have", "loudly: the engine ends at a seed with a divided prompt", "it puts back the generator's state",
         source=("gen.set_offset(gen.get_offset() - 4)", "self.discard_request_mask.np[:num_reqs]", "self.input_batch.generators.get(")),
    Seam("vllm.v1.worker.gpu_worker:Worker._make_model_runner", Kind.OVERRIDE, ("worker/v1.py",), "builds our V1 runner", "silently: vLLM's own runner would route nothing, and the composite fail at its first keyword", ONE_RUNNER,
         parameters=("self",), complete=True),
    Seam("vllm.v1.worker.gpu_worker:Worker.determine_available_memory", Kind.OVERRIDE, ("worker/v1.py",), "leaves memory for decoders that will be loaded into empty slots", "silently: too large a KV cache", "a model may say what memory it will want", parameters=("self",), complete=True),
    Seam(f"{V1}._model_forward", Kind.OVERRIDE, ("worker/v1.py",), "vLLM's documented method for further keywords of the model's forward: each step's routing", "silently: no request would have its memory; the parity tests see it", ONE_RUNNER,
         parameters=("self", "input_ids", "positions"), source=("**model_kwargs", "self.model(")),
    Seam(V1, Kind.READ, ("worker/v1.py", "worker/forward_contexts.py", "worker/drafter.py", "worker/slots.py"), "the step's requests, their places, and what attention needs", USED, ONE_RUNNER,
         source=("self.query_start_loc.np", "self.input_batch.req_ids", "self.optimistic_seq_lens_cpu", "self.seq_lens", "self.attn_groups", "self.input_batch.block_table[", "self.requests: dict[str, CachedRequestState]")),
    Seam(f"{V1}.load_model", Kind.OVERRIDE, ("worker/v1.py",), "the graph of the whole composite becomes one of the base and one of the memories (model)", "silently: every step would pay for all memories", "a model may say which of its parts are graphs",
         parameters=("self",), source=("self.model = CUDAGraphWrapper(",)),
    Seam(V1, Kind.WRITE, ("worker/v1.py",), "model: the composite without vLLM's graph", STARTS, "as above", source=("self.model =",)),
    Seam(f"{V1}.initialize_kv_cache", Kind.OVERRIDE, ("worker/v1.py",), "finds the towers' layers in the KV cache", STARTS, ONE_RUNNER, parameters=("self",)),
    Seam("vllm.compilation.cuda_graph:CUDAGraphWrapper", Kind.READ, ("worker/v1.py",), "makes the graphs of base and memories", STARTS, "a model may say which of its parts are graphs",
         parameters=("runnable", "vllm_config", "runtime_mode", "cudagraph_options"), has=("unwrap",)),
    Seam("vllm.compilation.cuda_graph:CUDAGraphWrapper.__call__", Kind.READ, ("worker/v1.py",), "obeys the forward context's mode, which is how we see that a step is captured", USED, "as above", source=("forward_context.cudagraph_runtime_mode",)),
    Seam("vllm.compilation.cuda_graph:CUDAGraphOptions", Kind.READ, ("worker/v1.py",), "the same", STARTS, "as above", accepts=("weak_ref_output",)),
    # Methods that the front end calls by name.
    Seam("vllm.v1.worker.worker_base:WorkerBase", Kind.NAME, ("worker/slots.py", "worker/v1.py", "engine/domain_updates.py"), "collective_rpc finds our workers' methods by name: they must not be vLLM's", "silently: vLLM's own method would be called", "never",
         without=("def stage_decoder", "def stage_ngrams", "def load_staged", "def install_staged", "def discard_staged", "def free_slot", "def step_times", "def draft_counts")),
    Seam("vllm:ModelRegistry", Kind.NAME, ("worker/plugin.py",), "the composite is registered by a name, and imported in the worker alone", STARTS, "never", has=("register_model",)),
    # V2: nothing is patched.
    Seam("vllm.v1.worker.gpu.model_states:resolve_model_state_cls", Kind.NAME, ("worker/registered.py",), "asks the model for its ModelState by get_model_state_cls. With it the V2 runner needs no subclass and no patch: routing and attention contexts come from prepare_attn and prepare_inputs",
         "silently: vLLM's own ModelState, and no request would have its memory; the parity tests see it", "never", source=('hasattr(model, "get_model_state_cls")', "return model.get_model_state_cls()")),
    Seam("vllm.v1.worker.gpu.model_states.interface:ModelState.custom_sampler", Kind.READ, ("worker/v2.py",),
         "not used, and replaces none of the seams here: a sampler is given logits alone, without hidden states, and prompt log-probabilities don't pass it, so the mixture stays in compute_logits, which both call. "
         "It could give the V2 runner a rejection sampler for drafts, but not the drafter: init_speculator knows no custom_class",
         "no part of ours depends on it", "the V2 runner takes a proposer of its users': then drafting can move to it", parameters=("self", "sampler"), complete=True),
    Seam("vllm.v1.worker.gpu.spec_decode:init_speculator", Kind.FAULT, ("worker/v2.py",), "the V2 runner has no proposer of its users', so drafting is the V1 runner's", "loudly: --speculate is V1's", "custom_class appears in it", without=("custom_class",)),
    Seam("vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model", Kind.READ, ("worker/v2.py",), "attention metadata come before the model's inputs", "loudly: a step without routing", V2_USE,
         in_order=("self.model_state.prepare_attn(", "**self.model_state.prepare_inputs(")),
    Seam(f"{STATE}.add_request", Kind.OVERRIDE, ("worker/v2.py",), "reads what a request chose", "silently: no memories; the parity tests see it", V2_USE, parameters=("self", "req_index", "new_req_data"), complete=True),
    Seam("vllm.v1.worker.gpu.model_states.interface:ModelState.remove_request", Kind.OVERRIDE, ("worker/v2.py",), "forgets it", "silently: slots never become free", V2_USE, parameters=("self", "req_id"), complete=True),
    Seam(f"{STATE}.prepare_attn", Kind.OVERRIDE, ("worker/v2.py",), "the step's routing and contexts", "loudly, at a step", V2_USE, parameters=("self", "input_batch", "cudagraph_mode", "block_tables", "slot_mappings", "attn_groups")),
    Seam(f"{STATE}.prepare_inputs", Kind.OVERRIDE, ("worker/v2.py",), "keywords of the model's forward", "silently: no memories", V2_USE, parameters=("self", "input_batch", "req_states"), complete=True),
    Seam(f"{STATE}.prepare_dummy_inputs", Kind.OVERRIDE, ("worker/v2.py",), "the keywords with which the step is captured", "silently: graphs without memories", V2_USE, parameters=("self", "num_reqs", "num_tokens"), complete=True),
    Seam("vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager.capture", Kind.READ, ("worker/v2.py",), "captures with dummy inputs", "silently: graphs without memories", V2_USE, source=("**model_state.prepare_dummy_inputs(num_reqs, num_tokens)",)),
    Seam("vllm.v1.worker.gpu.input_batch:InputBatch", Kind.READ, ("worker/v2.py",), "the step's requests and their places", USED, V2_USE, accepts=("req_ids", "query_start_loc_np", "seq_lens", "seq_lens_cpu_upper_bound", "num_tokens_after_padding")),
    # The text of a step, for n-gram memories.
    Seam("vllm.v1.worker.gpu_input_batch:InputBatch.__init__", Kind.WRITE, ("worker/text.py",), "token_ids_cpu: the text of each request, and what stands in it of a step that is scheduled ahead; num_computed_tokens_cpu: where the step's tokens begin in it",
         "silently: other contexts; the parity tests see it", "the runner keeps its table complete, or tells a model what text a row has", source=("self.token_ids_cpu =", "self.num_computed_tokens_cpu =")),
    Seam(f"{V1}._prepare_input_ids", Kind.READ, ("worker/text.py",), "input_ids: the step's tokens, which the device alone knows where steps are scheduled ahead", "silently: other contexts; the parity tests see it", ONE_RUNNER,
         source=("self.input_ids.gpu", "self.input_batch.prev_sampled_token_ids")),
    Seam(f"{V1}._bookkeeping_sync", Kind.READ, ("worker/text.py",), "use_async_scheduling: leaves -1 in the table for each sampled token", "silently: the device is waited for in vain", ONE_RUNNER, source=("sampled_ids = [-1]", "self.use_async_scheduling")),
    Seam("vllm.v1.worker.gpu.states:RequestState.__init__", Kind.READ, ("worker/text.py",), "all_token_ids: the same of the V2 runner, which its kernels write", USED, V2_USE, source=("self.all_token_ids = StagedWriteTensor(",)),
    Seam("vllm.v1.worker.gpu.input_batch:InputBatch", Kind.READ, ("worker/text.py",), "where each request's text is, and where the step's tokens begin in it", USED, V2_USE,
         accepts=("idx_mapping_np", "query_start_loc_np", "num_computed_tokens_np", "num_reqs")),
    # Attention of a part of a step.
    Seam("vllm.v1.worker.block_table:BlockTable.get_device_tensor", Kind.READ, CONTEXTS, "the blocks of a step's requests", USED, METADATA, parameters=("self", "num_reqs"), complete=True),
    Seam("vllm.v1.worker.block_table:BlockTable", Kind.READ, CONTEXTS, "the same on the CPU", USED, METADATA, has=("get_cpu_tensor",), source=("self.block_size =",)),
    Seam("vllm.v1.worker.utils:AttentionGroup.build_metadata", Kind.READ, CONTEXTS, "metadata of one decoder's requests", USED, METADATA, parameters=("self", "common_attn_metadata")),
    Seam("vllm.v1.worker.utils:AttentionGroup", Kind.READ, CONTEXTS, "the layers of a group", STARTS, METADATA, has=("layer_names",)),
    Seam("vllm.v1.attention.backend:CommonAttentionMetadata", Kind.READ, CONTEXTS, "what they are built from", USED, METADATA,
         accepts=("query_start_loc", "query_start_loc_cpu", "seq_lens", "block_table_tensor", "slot_mapping", "seq_lens_cpu_upper_bound")),
    Seam("vllm.forward_context:create_forward_context", Kind.READ, CONTEXTS, "the context in which a tower runs", USED, METADATA, accepts=("attn_metadata", "vllm_config", "slot_mapping")),
    # Fair shares.
    Seam("vllm.config.scheduler:SchedulerConfig.get_scheduler_cls", Kind.NAME, FAIR, "scheduler_cls may name a function that chooses", STARTS, "fair shares between clients in vLLM's scheduler", source=("resolve_obj_by_qualname(self.scheduler_cls)",)),
    Seam("vllm.v1.engine.core:EngineCore.__init__", Kind.NAME, FAIR, "calls what that names with keywords", STARTS, "as above", source=("self.scheduler: SchedulerInterface = Scheduler(\n            vllm_config=vllm_config",)),
    Seam(f"{SCHEDULER}.schedule", Kind.OVERRIDE, FAIR, "what sits a step out is passed over by an attribute, and what waits is in one queue", "silently: no fair shares; test_fairness sees it", HOOK,
         source=("self.current_step += 1", "if self.current_step < request.next_decode_eligible_step:", "request_queue = self.waiting")),
    Seam(f"{SCHEDULER}.update_from_output", Kind.OVERRIDE, FAIR, "learns what a step took", "silently: no fair shares", HOOK, parameters=("self", "scheduler_output")),
    Seam("vllm.v1.core.sched.async_scheduler:AsyncScheduler", Kind.OVERRIDE, FAIR, "the same with steps that are scheduled ahead; its drafts stay with the worker", LOUD, HOOK),
    Seam(f"{SCHEDULER}._preempt_request", Kind.READ, FAIR, "makes room for a client that has less; who is preempted goes back to the queue", USED, HOOK, parameters=("self", "request", "timestamp", "drop_stale_output"), complete=True,
         source=("self.waiting.prepend_request(request)",), without=("self.max_num_running_reqs",)),
    Seam(f"{SCHEDULER}._request_blocks_can_be_freed", Kind.READ, FAIR, "whether a request may be preempted", USED, HOOK, parameters=("self", "request"), complete=True),
    Seam("vllm.v1.core.sched.request_queue:RequestQueue", Kind.READ, FAIR, "takes requests out of the queue, and puts them back", USED, HOOK, has=("add_request", "remove_requests")),
    Seam("vllm.v1.request:Request.__init__", Kind.WRITE, (*FAIR,), "next_decode_eligible_step and spec_token_ids: who sits a step out, and drafts that can't be verified any more; client is ours", "loudly, at the first step of several clients", HOOK,
         source=("self.next_decode_eligible_step = 0", "self.spec_token_ids: list[int] = []")),
    Seam("vllm.v1.request:Request", Kind.WRITE, FAIR, "our attribute `client` lies on its objects", USED, HOOK, without=("__slots__",)),
    Seam("vllm.v1.worker.gpu_input_batch:CachedRequestState", Kind.WRITE, ("worker/v1.py", "worker/slots.py"), "our attribute `memory` lies on its objects", USED, ONE_RUNNER, without=("__slots__", "slots=True")),
)  # fmt: skip
