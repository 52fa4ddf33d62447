"""vLLM's options for its front end: each has its effect here too, or is refused by name. None is accepted and ignored.

A test goes through all that vLLM declares: one that an upgrade adds is in neither list, and fails there.
"""

from collections.abc import Collection

from memdec.server.errors import StartupError

NOT_HERE = "vLLM's own launcher alone has it; leave it out"
NO_ROUTE = "is about a route that this server doesn't have; leave it out"
SUPERVISOR = "is of vLLM's data-parallel supervisor, which doesn't run here; leave it out"

REFUSED = {
    "headless": NOT_HERE,
    "grpc": NOT_HERE,
    "grpc_port": NOT_HERE,
    "tokens_only": NOT_HERE,
    "enable_scale_out": NO_ROUTE,
    "data_parallel_supervisor_port": SUPERVISOR,
    "dp_supervisor_probe_interval_s": SUPERVISOR,
    "dp_supervisor_probe_timeout_s": SUPERVISOR,
    "dp_supervisor_probe_failure_threshold": SUPERVISOR,
    "data_parallel_multi_port_external_lb": SUPERVISOR,
    "lora_modules": "adapters don't work with memory decoders yet; leave it out",
    "trust_request_mm_kwargs": "models that take images or sound aren't served; leave it out",
    "tool_server": "tools that the server itself runs were not tried with memory decoders; leave it out",
    "cohere_is_reasoning_model": NO_ROUTE,
    "anthropic_disabled_thinking_effort": NO_ROUTE,
    "enable_flash_late_interaction": "pooling models aren't served; leave it out",
    "h11_max_incomplete_event_size": "heads of requests are bounded already, at 64 KiB and 30 s; leave it out",
    "h11_max_header_count": "heads of requests are bounded already, at 64 KiB and 30 s; leave it out",
}

# Of the engine's options, those that what we fill in would override, or that our checks of the models would not see.
REFUSED_OF_THE_ENGINE = {
    "enable_lora": "not supported with memory decoders yet; leave it out",
    "speculative_config": "not supported with memory decoders yet; leave it out, see --speculate",
    "runner": "only models that generate text are served; leave it out",
    "hf_config_path": "base and decoders are checked by the config.json in their folders; leave it out",
    "code_revision": "a model is fetched whole, with its code, at --revision; leave it out",
    "tokenizer_revision": "a model is fetched whole, with its tokenizer, at --revision; leave it out",
}
REFUSED_WITH_DECODERS = {
    "worker_cls": "decoders need the worker that memdec serve chooses; leave it out",
    "tokenizer": "decoders are checked against the base's own tokenizer; leave it out",
    "skip_tokenizer_init": "decoders are checked against the base's own tokenizer; leave it out",
}

HONOURED = frozenset(
    {  # by vLLM's serving objects, which get all arguments
        "chat_template", "chat_template_content_format", "trust_request_chat_template", "default_chat_template_kwargs", "response_role",
        "return_tokens_as_token_ids", "enable_auto_tool_choice", "exclude_tools_when_tool_choice_none", "tool_call_parser", "tool_parser_plugin",
        "tool_strict_level", "max_log_len", "enable_prompt_tokens_details", "enable_per_request_metrics", "enable_server_load_tracking",
        "enable_force_include_usage", "sse_keep_alive_interval", "enable_log_outputs", "enable_log_deltas", "cohere_format", "log_error_stack",
        "fingerprint_mode", "fingerprint_value",
    }
    | {  # by the app and its layers
        "allow_credentials", "allowed_origins", "allowed_methods", "allowed_headers", "api_key", "root_path", "middleware", "enable_request_id_headers",
        "disable_fastapi_docs", "enable_offline_docs", "enable_tokenizer_info_endpoint",
    }
    | {  # by the socket and uvicorn
        "host", "port", "uds", "uvicorn_log_level", "disable_uvicorn_access_log", "disable_access_log_for_endpoints", "ssl_keyfile", "ssl_certfile",
        "ssl_ca_certs", "enable_ssl_refresh", "ssl_cert_reqs", "ssl_ciphers",
    }
    | {"model_tag", "config", "api_server_count"}  # by the command line
)  # fmt: skip


def refuse_without_effect(given: Collection[str], decoders: bool) -> None:
    """Raise StartupError for an option that would have no effect, or the wrong one.

    `given`: names of the options that were given, as `--uds`; `decoders`: whether there are any.
    """
    refused = REFUSED | REFUSED_OF_THE_ENGINE | (REFUSED_WITH_DECODERS if decoders else {})
    for name, why in refused.items():
        option = f"--{name.replace('_', '-')}"
        for spelt in (option, option.replace("--", "--no-", 1)):
            if spelt in given:
                raise StartupError(f"{spelt}: {why}")
