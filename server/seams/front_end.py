"""The API process: the engine's client, the app around vLLM's layers, the command line."""

from memdec.server.seams.seam import STARTS, USED, Kind, Seam

CLIENT = "vllm.v1.engine.async_llm:AsyncLLM"
OUTPUTS = "vllm.v1.engine.output_processor:OutputProcessor"
CORE = "vllm.v1.engine.core_client"
ERRORS = "vllm.entrypoints.serve.exception_handling"
SILENT_METHOD = "silently: vLLM would no longer call our method"
ARGUMENTS = "vllm.utils.argparse_utils:FlexibleArgumentParser"

SEAMS = (
    Seam(CLIENT, Kind.BECOME, ("engine/client.py", "launch/endpoint_plugin.py"), "vLLM's own launcher makes the engine's client; in the plugin it becomes ours", STARTS,
         "an endpoint plugin may name the class of the engine's client", has=("from_vllm_config", "collective_rpc", "errored", "vllm_config", "model_config"), source=("self.scheduler_config", "self.renderer =", "self.input_processor =")),
    Seam(f"{CLIENT}.generate", Kind.OVERRIDE, ("engine/client.py", "engine/rag.py", "engine/answer_scoring.py"), "passages, replays and scored prompts stand in front of it", SILENT_METHOD,
         "never", accepts=("prompt", "sampling_params", "request_id", "priority")),
    Seam(f"{CLIENT}.add_request", Kind.OVERRIDE, ("engine/client.py",), "the one way of all routes into the engine: cache salts, slots, turns, keys' tokens", SILENT_METHOD,
         "a public hook that sees a request's parameters before the engine does", parameters=("self", "request_id", "prompt", "params"), accepts=("priority",)),
    Seam(f"{CLIENT}.check_admission", Kind.OVERRIDE, ("engine/client.py",), "nothing is admitted while the server drains", SILENT_METHOD,
         "vLLM refuses new requests itself once shutdown has begun", parameters=("self", "n", "request_id"), complete=True),
    Seam(f"{CLIENT}.check_health", Kind.OVERRIDE, ("engine/client.py",), "/health answers 503 while the engine hangs or drains", SILENT_METHOD,
         "vLLM's own health check sees an engine that no longer steps", parameters=("self",), complete=True),
    Seam(f"{CLIENT}.shutdown", Kind.OVERRIDE, ("engine/client.py",), "requests that run past the drain end with an error instead of hanging", SILENT_METHOD,
         "vLLM ends unfinished requests with an error when its engine is shut down", parameters=("self", "timeout"), complete=True),
    Seam(CLIENT, Kind.READ, ("engine/client.py",), "output_handler, the task whose event loop the last errors are put on; absent from clients that are half made, when shutdown is called all the same", STARTS,
         "vLLM ends unfinished requests with an error when its engine is shut down", source=("self.output_handler: asyncio.Task | None = None", "self.output_handler = asyncio.create_task(")),
    Seam(f"{CLIENT}._run_output_handler", Kind.READ, ("engine/liveness.py",), "looks get_output_async up anew for each step, so ours in its place sees every step", "silently: no engine would ever count as hung",
         "vLLM tells when an engine last stepped", source=("await engine_core.get_output_async()",)),
    Seam(f"{CORE}:AsyncMPClient.get_output_async", Kind.WRITE, ("engine/liveness.py",), "every step's outputs pass it", STARTS, "vLLM tells when an engine last stepped"),
    Seam("vllm.v1.engine:EngineCoreOutputs", Kind.READ, ("engine/liveness.py",), "engine_index says whose step it was", USED, "vLLM tells when an engine last stepped", has=("engine_index",)),
    Seam(f"{CORE}:MPClient.__init__", Kind.READ, ("engine/liveness.py",), "engine_ranks_managed: the numbers of a client's engines", USED, "vLLM tells when an engine last stepped",
         source=('rank.to_bytes(2, "little") for rank in self.engine_ranks_managed',)),
    Seam(f"{CORE}:DPLBAsyncMPClient", Kind.READ, ("engine/liveness.py",), "reqs_in_flight: which of several engines has which request", USED, "vLLM tells when an engine last stepped",
         source=("self.reqs_in_flight[request.request_id] = chosen_engine",)),
    Seam(f"{CORE}:AsyncMPClient.call_utility_all_async", Kind.READ, ("engine/client.py",), "calls a method on the workers of every replica; collective_rpc reaches one replica's answers alone", USED,
         "AsyncLLM.collective_rpc returns the answers of all replicas", parameters=("self", "method", "args"), complete=True),
    Seam("vllm.v1.engine.core:EngineCore.collective_rpc", Kind.NAME, ("engine/client.py",), "the method that the call above names", USED, "as above",
         parameters=("self", "method", "timeout", "args", "kwargs"), complete=True),
    Seam("vllm.v1.engine.input_processor:InputProcessor", Kind.WRITE, ("engine/client.py",), "speculative_config is None for it: it would refuse min_p and logit_bias, whose requests draft nothing here", STARTS,
         "a custom proposer may say which sampling parameters it takes", source=("self.speculative_config",)),
    Seam("vllm.config.scheduler:SchedulerConfig", Kind.WRITE, ("engine/client.py",), "max_num_queued_reqs is taken over by our admission, which counts what is on its way", STARTS,
         "vLLM counts requests from their admission on", has=("max_num_queued_reqs",)),
    Seam("vllm.v1.engine.input_processor:InputProcessor._validate_params", Kind.WRITE, ("engine/client.py",), "structured_outputs_config is None for it: grammars are tried in the sandbox instead of on the event loop", STARTS,
         "vLLM tries grammars outside of the event loop, within a time", source=("self.structured_outputs_config,",)),
    Seam("vllm.sampling_params:SamplingParams._validate_structured_outputs", Kind.READ, ("engine/grammars.py", "engine/sandbox.py"), "vLLM's own checks, which the sandbox runs; without a configuration the front end skips them; _backend is what they choose", USED,
         "as above", parameters=("self", "model_config", "structured_outputs_config", "tokenizer"), complete=True, source=("structured_outputs_config is None", "_backend")),
    Seam("vllm.v1.structured_output:StructuredOutputManager.grammar_init", Kind.WRITE, ("engine/sandbox.py",), "_create_grammar and _use_async_grammar_compilation: its set-up without a grammar, then one grammar at a time", USED, "as above",
         source=("self._create_grammar(request)", "_use_async_grammar_compilation")),
    Seam("vllm.v1.structured_output:StructuredOutputManager._create_grammar", Kind.READ, ("engine/sandbox.py",), "compiles a grammar", USED, "as above", parameters=("self", "request"), complete=True),
    *(
        Seam(f"vllm.entrypoints.generate.base.protocol:{name}", Kind.WRITE, ("engine/grammars.py",), "validate_structural_tag_payload, which it calls, compiles a client's tag on the event loop: the sandbox does", STARTS, "as above",
             source=("validate_structural_tag_payload(",))
        for name in ("validate_structural_tag_response_format", "validate_structured_outputs_structural_tag")
    ),
    Seam(OUTPUTS, Kind.BECOME, ("engine/client.py", "engine/timed_outputs.py"), "timings by mode and domain; the output loop holds on to the object that vLLM has made", STARTS,
         "AsyncLLM takes the class of its output processor, or its stat loggers see each request's extra arguments", has=("propagate_error",)),
    Seam(f"{OUTPUTS}.__init__", Kind.READ, ("engine/client.py", "engine/timed_outputs.py"), "request_states: the requests under way, with their slots", USED, "as above", source=("request_states",)),
    Seam(f"{OUTPUTS}.add_request", Kind.OVERRIDE, ("engine/timed_outputs.py",), "remembers what each request chose", "silently: no timings by domain", "as above", parameters=("self", "request")),
    Seam(f"{OUTPUTS}.process_outputs", Kind.OVERRIDE, ("engine/timed_outputs.py",), "a grammar that no token can go on from ends its request with an error", "silently: such an answer would just end", "vLLM says why the request ended",
         parameters=("self", "engine_core_outputs")),
    Seam(f"{OUTPUTS}._update_stats_from_output", Kind.OVERRIDE, ("engine/timed_outputs.py",), "the time of each token", "silently: no timings by domain", "as above",
         parameters=("self", "req_state", "engine_core_output", "engine_core_timestamp", "iteration_stats"), complete=True),
    Seam(f"{OUTPUTS}._update_stats_from_finished", Kind.OVERRIDE, ("engine/timed_outputs.py",), "the mean time per token of a finished request", "silently: no timings by domain", "as above",
         parameters=("self", "req_state", "finish_reason", "iteration_stats"), complete=True),
    Seam(f"{OUTPUTS}.do_tracing", Kind.OVERRIDE, ("engine/timed_outputs.py", "engine/tracing.py"), "mode and domain on the spans", "silently: spans without mode and domain", "vLLM's spans carry a request's extra arguments",
         parameters=("self", "engine_core_output", "req_state", "iteration_stats"), complete=True),
    Seam("vllm.v1.engine.output_processor:RequestState", Kind.WRITE, ("engine/client.py", "engine/timed_outputs.py"), "our attributes lie on its objects: memory_label, memory_segment, memory_slots", USED, "as above", without=("__slots__",)),
    Seam("vllm.entrypoints.launchers.launcher:serve_http", Kind.READ, ("launch/running.py",), "a signal shuts the engine down before the HTTP server", "silently: clients would be cut off at once", "never",
         in_order=("engine_client.shutdown", "server.should_exit = True")),
    Seam("vllm.entrypoints.launchers.launcher:setup_server", Kind.READ, ("launch/running.py",), "the socket is bound before the engine starts", USED, "never", accepts=("reuse_port",)),
    Seam("vllm.plugins.endpoint_plugins.interface:EndpointPlugin", Kind.NAME, ("launch/endpoint_plugin.py",), "found by entry point; its four members", STARTS, "never", has=("attach_router", "init_state", "name", "required_tasks")),
    Seam("starlette.applications:Starlette.__call__", Kind.WRITE, ("launch/endpoint_plugin.py",), "middleware_stack: our app takes the place of the stack of vLLM's app", STARTS, "an endpoint plugin may return the app",
         source=("await self.middleware_stack(scope, receive, send)",)),
    Seam("uvicorn.protocols.http.auto:AutoHTTPProtocol", Kind.WRITE, ("launch/endpoint_plugin.py",), "bounds on heads, bodies and time inside of vLLM's launcher", STARTS, "an endpoint plugin may set uvicorn's options"),
    Seam(f"{ARGUMENTS}.load_config_file", Kind.OVERRIDE, ("launch/vllm_arguments.py",), "takes our options out of a configuration file", "loudly: vLLM's parser would refuse ours", "the parser takes further options", parameters=("self", "file_path"), complete=True),
    Seam("argparse:_ArgumentGroup", Kind.READ, ("launch/vllm_arguments.py",), "_group_actions: defaults aren't shown twice in the help", USED, "never (it is argparse's)", source=("_group_actions",)),
    Seam("vllm.model_executor.models.interfaces:", Kind.READ, ("launch/vllm_arguments.py",), "which kinds of model can't be part of a composite", STARTS, "never",
         has=("is_hybrid", "is_attention_free", "has_inner_state", "supports_multimodal")),
    Seam("vllm.model_executor.models.interfaces_base:is_pooling_model", Kind.READ, ("launch/vllm_arguments.py",), "the same", STARTS, "never"),
    Seam("vllm.entrypoints.serve.middleware.register:init_entrypoints_middleware", Kind.READ, ("engine/openai_layer.py",), "adds six layers, of which ours take the places of three; CORS is taken out again", "silently: two layers of a kind",
         "an argument that leaves CORS out", source=("CORSMiddleware,", "(args.api_key or [envs.VLLM_API_KEY]) if key", "if args.enable_request_id_headers:")),
    Seam("vllm.entrypoints.serve.engine.serving:BaseServing._base_request_id", Kind.READ, ("api/middleware.py",), "the header by which a request is named", "silently: ids in the log that the client doesn't know", "never", source=('raw_request.headers.get("X-Request-Id")',)),
    Seam(f"{ERRORS}.handlers.http:http_exception_handler", Kind.FAULT, ("api/app.py",), "its answers lack the headers of the exception", "silently", "the handler passes headers on", without=(".headers",)),
    *(
        Seam(f"{ERRORS}.{module}:", Kind.WRITE, ("engine/off_loop.py",), "sanitize_message takes quadratic time on the event loop: messages are cut first", STARTS, "sanitize_message takes linear time, or cuts first",
             has=("sanitize_message",), source=("message=sanitize_message(",))
        for module in ("error_response", "handlers.http", "handlers.validation")
    ),
    *(
        Seam(f"vllm.entrypoints.serve.tokenize.serving:ServingTokenization.{name}", Kind.WRITE, ("engine/off_loop.py",), "tokenises on the event loop: done in threads", STARTS, "vLLM does the same",
             parameters=("self", "request", "raw_request"), complete=True)
        for name in ("create_tokenize", "create_detokenize")
    ),
    Seam("vllm.entrypoints.openai.models.serving:OpenAIServingModels.__init__", Kind.READ, ("api/app.py",), "base_model_paths is one list, which several objects hold: domains are added to it in place", "silently: a domain's name would be unknown to vLLM",
         "served models may be added at run time", source=("self.base_model_paths = base_model_paths", "base_model_paths=base_model_paths")),
    Seam("vllm.entrypoints.openai.models.serving:OpenAIServingModels.model_name", Kind.WRITE, ("api/app.py",), "answers carry the name that the client asked for", STARTS, "vLLM answers with the name that was asked for", parameters=("self", "lora_request"), complete=True),
)  # fmt: skip
