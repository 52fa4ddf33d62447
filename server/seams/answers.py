"""The API process: vLLM's serving objects, whose answers are put right."""

from memdec.server.seams.seam import LOUD, STARTS, USED, Kind, Seam

COMPLETION = "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion"
CHAT = "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat"
RESPONSES = "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses"
DETOKENIZER = "vllm.v1.engine.detokenizer:IncrementalDetokenizer"
MENDED = ("engine/answers.py",)
LARGE = ("engine/large_answers.py",)
SILENT = "silently: vLLM's own answers, with their faults"
LIMITED = "engine/openai_layer.py"

SEAMS = (
    Seam("vllm.entrypoints.generate.api_router:", Kind.NAME, (*MENDED, *LARGE, LIMITED), "the names of the serving objects in the app's state", STARTS, "never",
         source=("state.openai_serving_completion =", "state.openai_serving_chat =")),
    Seam(COMPLETION, Kind.BECOME, MENDED, "answers are put right by a subclass; vLLM makes the object", STARTS, "each fault below is mended"),
    Seam(CHAT, Kind.BECOME, MENDED, "the same for chats", STARTS, "each fault below is mended"),
    Seam(RESPONSES, Kind.BECOME, (LIMITED, "engine/responses.py"), "the same for responses", STARTS, "background requests that fail end, with their streams", has=("create_error_response",)),
    Seam(f"{COMPLETION}.create_completion", Kind.OVERRIDE, MENDED, "a request that scores its prompt says so to the engine's client", SILENT, "the engine takes max_tokens 0", parameters=("self", "request", "raw_request"), complete=True),
    Seam(f"{COMPLETION}.render_completion_request", Kind.OVERRIDE, MENDED, "an echoed prompt needs its text, an answer room in the context", SILENT, "return_token_ids leaves the text in", parameters=("self", "request"), complete=True),
    Seam(f"{CHAT}.render_chat_request", Kind.OVERRIDE, MENDED, "an answer needs room in the context", SILENT, "vLLM refuses prompts that fill it", parameters=("self", "request"), complete=True),
    Seam(f"{COMPLETION}.render_completion_request", Kind.WRITE, (LIMITED,), "the app's limit on prompts' tokens", STARTS, "an option of vLLM's for the longest prompt"),
    Seam(f"{CHAT}.render_chat_request", Kind.WRITE, (LIMITED,), "the same", STARTS, "as above", source=()),
    Seam(f"{RESPONSES}._render_resolved_response_inputs", Kind.WRITE, (LIMITED,), "the same: online_renderer.render_responses", STARTS, "as above", source=("online_renderer.render_responses(",)),
    *(
        Seam(target, Kind.WRITE, (LIMITED,), "override_max_tokens: where an answer ends whose client names no max_tokens", STARTS, "an option of vLLM's for the longest answer", source=("self.override_max_tokens = (",))
        for target in (f"{COMPLETION}.__init__", f"{CHAT}.__init__", f"{RESPONSES}.__init__")
    ),
    Seam(f"{COMPLETION}.completion_stream_generator", Kind.OVERRIDE, MENDED, "events of one token, with the reason apart from the text", SILENT, "one event for each choice and token, as OpenAI's",
         parameters=("self", "request", "engine_inputs", "result_generator")),
    Seam(f"{CHAT}.chat_completion_stream_generator", Kind.OVERRIDE, MENDED, "the same for chats", SILENT, "as above", parameters=("self", "request", "result_generator")),
    Seam(f"{COMPLETION}.request_output_to_completion_response", Kind.OVERRIDE, MENDED, "offsets and names of tokens of a plain answer", SILENT, "log-probabilities are named by token", parameters=("self", "final_res_batch", "request")),
    Seam(f"{COMPLETION}._create_completion_logprobs", Kind.OVERRIDE, MENDED, "one entry for each candidate, offsets in the text", SILENT, "log-probabilities are named by token",
         parameters=("self", "token_ids", "top_logprobs", "num_output_top_logprobs", "tokenizer", "logprob_token_ids", "initial_text_offset", "return_as_token_id"), complete=True),
    Seam(f"{CHAT}._create_chat_logprobs", Kind.OVERRIDE, MENDED, "each token's own bytes", SILENT, "bytes come from the token instead of its text", parameters=("self", "token_ids", "top_logprobs", "tokenizer"),
         source=("list(step_decoded.encode(",)),
    Seam("vllm.entrypoints.openai.completion.protocol:CompletionRequest", Kind.WRITE, MENDED, "vllm_xargs: says that a request scores its prompt", USED, "the engine takes max_tokens 0", has=("vllm_xargs",)),
    Seam(f"{COMPLETION}._extract_prompt_text", Kind.READ, MENDED, "the text of a prompt that is echoed", USED, "return_token_ids leaves the text in", parameters=("self", "prompt"), complete=True),
    Seam(f"{COMPLETION}._get_decoded_token", Kind.READ, MENDED, "vLLM's text of a candidate", USED, "log-probabilities are named by token", parameters=("logprob", "token_id", "tokenizer", "return_as_token_id")),
    Seam(f"{COMPLETION}.completion_stream_generator", Kind.FAULT, ("engine/answer_tokens.py", "engine/answers.py"), "offsets count letters of placeholders; a prompt with return_token_ids is echoed as nothing", SILENT, "each of the two texts is gone",
         source=("next_text_offsets[i] = logprobs.text_offset[-1] + len(", 'prompt_text = ""')),
    Seam("vllm.entrypoints.openai.completion.protocol:CompletionRequest.build_tok_params", Kind.FAULT, MENDED, "return_token_ids leaves the prompt's text out", SILENT, "it doesn't", source=("not self.return_token_ids",)),
    Seam("vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_sampling_params", Kind.FAULT, ("engine/answer_scoring.py",), "max_tokens 0 generates a token", SILENT, "the engine takes max_tokens 0",
         source=("max_tokens if not echo_without_generation else 1",)),
    Seam("vllm.v1.engine.input_processor:InputProcessor", Kind.FAULT, ("engine/answer_scoring.py",), "a prompt that fills the context is refused", SILENT, "the engine takes max_tokens 0", source=("prompt_len == max_prompt_len",)),
    Seam(f"{COMPLETION}._create_completion", Kind.READ, LARGE, "an answer is passed on as it is built, so it may be one that is still to be built", "loudly, at the first large answer", "answers are written choice by choice",
         source=("return response", "self.request_output_to_completion_response(")),
    Seam(f"{COMPLETION}.request_output_to_completion_response", Kind.WRITE, LARGE, "large answers are built in a thread", STARTS, "answers are written choice by choice"),
    Seam(f"{CHAT}.chat_completion_full_generator", Kind.WRITE, LARGE, "the same for chats", STARTS, "as above", parameters=("self", "request", "result_generator")),
    Seam(CHAT, Kind.READ, LARGE, "the same: whatever the generator returns is passed on", "loudly, at the first large answer", "as above", source=("return await self.chat_completion_full_generator(",)),
    Seam(f"{RESPONSES}._create_response_logprobs", Kind.OVERRIDE, MENDED, "each token's own bytes", SILENT, "bytes come from the token instead of its text", parameters=("self", "token_ids", "logprobs", "tokenizer", "top_logprobs"), complete=True,
         source=("list(text.encode(",)),
    Seam(f"{RESPONSES}._validate_generator_input", Kind.OVERRIDE, MENDED, "a prompt that fills the context gets the context's message", SILENT, "vLLM's message is true of it", parameters=("self", "engine_input"), complete=True,
         source=("prompt_len >= max_model_len",)),
    Seam(f"{RESPONSES}._process_simple_streaming_events", Kind.OVERRIDE, MENDED, "log-probabilities of last_output's tokens without text go to the next event", SILENT, "vLLM keeps them", parameters=("self", "request", "sampling_params", "result_generator"),
         source=("if target_state == _StateType.NONE:\n                    continue", "processor.emit_delta(dm, output, _get_logprobs)")),
    Seam(f"{RESPONSES}.responses_stream_generator", Kind.READ, MENDED, "its events come from _process_simple_streaming_events", SILENT, "as above", source=("self._process_simple_streaming_events",)),
    Seam(f"{RESPONSES}.responses_full_generator", Kind.OVERRIDE, ("engine/responses.py",), "passages count as usage", SILENT, "usage may be added to"),
    Seam(f"{RESPONSES}._run_background_request", Kind.OVERRIDE, ("engine/responses.py",), "a background request that raises stays queued for ever", SILENT, "vLLM marks it as failed", parameters=("self", "request")),
    Seam(f"{RESPONSES}._run_background_request_stream", Kind.OVERRIDE, ("engine/responses.py",), "and whoever reads its stream waits for ever", SILENT, "vLLM ends the stream", parameters=("self", "request"),
         source=("self.event_store[request.request_id] =",)),
    Seam(f"{RESPONSES}.responses_background_stream_generator", Kind.OVERRIDE, ("engine/responses.py",), "ends when there will be no more events", SILENT, "vLLM's ends too", parameters=("self", "response_id", "starting_after"), complete=True),
    Seam(f"{RESPONSES}._create_responses", Kind.READ, ("engine/responses.py",), "background_tasks holds what still runs", USED, "as above", source=("self.background_tasks[response_id] = task",)),
    Seam(f"{RESPONSES}.responses_stream_generator", Kind.READ, ("api/responses.py",), "begins with two events before the engine is asked, and ends with the whole answer", "silently: errors would come as broken streams", "vLLM's streams end with an error event",
         source=("await self.responses_full_generator(", "validate_json(error_json)")),
    *(
        Seam(f"vllm.entrypoints.openai.{name}.serving:logger", Kind.READ, (LIMITED,), "writes a traceback for every mistake of a client that ends a stream: those are filtered out", STARTS, "vLLM logs its own errors alone with a traceback", has=("addFilter",))
        for name in ("completion", "chat_completion", "responses")
    ),
    Seam("vllm.outputs:RequestOutput", Kind.READ, ("engine/rag.py", "engine/answer_streams.py", "engine/answer_scoring.py"), "outputs of answers in several passes are made anew", USED, "never",
         parameters=("request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished")),
    Seam("vllm.outputs:CompletionOutput", Kind.READ, ("engine/rag.py", "engine/answer_streams.py"), "the same", USED, "never", parameters=("index", "text", "token_ids", "cumulative_logprob", "logprobs")),
    Seam(f"{DETOKENIZER}.from_new_request", Kind.READ, ("engine/rag.py",), "the text of an answer in several passes", USED, "the engine may replace a running request's prompt", parameters=("tokenizer", "request"), complete=True),
    Seam(f"{DETOKENIZER}.update", Kind.READ, ("engine/rag.py",), "the same", USED, "as above", parameters=("self", "new_token_ids", "stop_terminated"), complete=True),
    Seam(f"{DETOKENIZER}.get_next_output_text", Kind.READ, ("engine/rag.py",), "the same", USED, "as above", parameters=("self", "finished", "delta"), complete=True),
    Seam("vllm.tokenizers.detokenizer_utils:convert_ids_list_to_tokens", Kind.READ, ("engine/answer_tokens.py",), "vLLM's text of a token", LOUD, "log-probabilities are named by token"),
)  # fmt: skip
