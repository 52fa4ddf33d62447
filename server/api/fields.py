"""Body fields that would do nothing are refused by name: old names, misspelt ones, and with --strict-fields all that nobody knows."""

from collections.abc import Iterator

from pydantic import BaseModel

from memdec.server.errors import RequestError
from memdec.server.routing.spelling import NAMES, require_spelt_fields

GUIDED = "Use structured_outputs, or response_format."
GONE = {  # what older APIs, or clients' libraries, took under these names, and what to do instead
    "guided_json": GUIDED,
    "guided_regex": GUIDED,
    "guided_choice": GUIDED,
    "guided_grammar": GUIDED,
    "guided_decoding_backend": "The server chooses: --structured-outputs-config.backend.",
    "guided_whitespace_pattern": "Use structured_outputs with disable_any_whitespace.",
    "structural_tag": "Use structured_outputs with structural_tag.",
    "best_of": "Use n, and choose.",
    "early_stopping": "Leave it out.",
    "logits_processors": "Use logit_bias, allowed_token_ids or bad_words.",
    "functions": "Use tools.",
    "function_call": "Use tool_choice.",
    "extra_body": "It is an argument of OpenAI's SDK; over HTTP its fields stand in the body itself.",
}


def require_effective(request: BaseModel, strict: bool) -> None:
    """Raise RequestError for a field of a parsed request that would do nothing."""
    unknown = {name: value for name, value in (request.model_extra or {}).items() if name not in NAMES}
    for old in GONE.keys() & unknown.keys():
        if not _is_neutral(old, unknown[old], request):
            raise RequestError(f"{old} is not a field of this server, and would do nothing. {GONE[old]}", old)
    require_spelt_fields(unknown)
    require_spelt_fields(getattr(request, "vllm_xargs", None) or {}, "vllm_xargs: ")
    if getattr(request, "length_penalty", 1) not in (1, None) and not getattr(request, "use_beam_search", False):
        raise RequestError("length_penalty does nothing without use_beam_search. Leave one of them out, or give both.", "length_penalty")
    if strict and (name := next(_unknown(request), None)) is not None:
        raise RequestError(f"This server has no field {name[:80]!r}, and takes no others (--strict-fields).", name[:80])


def require_shown_tools(request: BaseModel, shown: bool) -> None:
    """Raise RequestError for tools that the base's chat template can't show. Forced calls and tool_choice "none" pass: they don't need it."""
    tools, choice = getattr(request, "tools", None), getattr(request, "tool_choice", None)
    if tools and not shown and choice in (None, "auto"):
        raise RequestError(
            "tools would do nothing: this base's chat template has no place for them, or calls them in a form that no parser is known for. "
            "Force a call with tool_choice, or have the server started with --chat-template, or --tool-call-parser and --enable-auto-tool-choice.",
            "tools",
        )


def pin_forced_calls(request: BaseModel) -> None:
    """Have a forced call's arguments follow their schema, unless the client says `strict: false`. vLLM leaves them free without `strict`."""
    if getattr(request, "tool_choice", None) in (None, "auto", "none"):
        return
    for tool in getattr(request, "tools", None) or ():
        function = getattr(tool, "function", tool)  # a chat's tool holds a function, a response's is one
        if getattr(function, "strict", False) is None:
            function.strict = True


def _is_neutral(name: str, value: object, request: BaseModel) -> bool:
    """Whether an old field's value equals what the server does anyway; null counts as not given."""
    return value is None or value is False or (name == "best_of" and value in (1, getattr(request, "n", 1)))


def _unknown(model: BaseModel, before: str = "") -> Iterator[str]:
    """Names of fields that neither vLLM nor we read, in nested objects too where vLLM has classes for them."""
    ours = NAMES if not before else ()
    for name in model.model_extra or {}:
        if name not in ours:
            yield before + name
    for name in model.model_fields_set & type(model).model_fields.keys():
        value = getattr(model, name)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, BaseModel):
                yield from _unknown(one, f"{before}{name}.")
