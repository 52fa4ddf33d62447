"""Chooses the one of vLLM's tool parsers that reads a base's calls, by the marks in the base's chat template."""

from argparse import Namespace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from memdec.decoders.reading.tokenizer import load_tokenizer

FORCED = "hermes"  # a parser that needs no tokens of its own
MARKS = (  # what stands in templates, and the parser that looks for it; the first that is found counts
    ("<minimax:tool_call>", "minimax_m2"),
    ("<seed:tool_call>", "seed_oss"),
    ("<start_function_call>", "functiongemma"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<arg_key>", "glm45"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3_json"),
    ("<|tool_call_start|>", "lfm2"),
    ('{"name": function name, "parameters":', "llama3_json"),
)


def choose_parser(args: Namespace, base: Path) -> None:
    """Fill in --enable-auto-tool-choice and --tool-call-parser where the user says neither; `tools_shown` is whether the base learns of tools.

    vLLM wants a parser for forced calls too, whose form its grammar sets; without a parser for the template it gets FORCED.
    """
    args.tools_shown = True
    if args.tool_call_parser is not None or args.enable_auto_tool_choice:
        return
    tokenizer = load_tokenizer(base)
    template = _template(args, tokenizer)
    parser = parser_for(template)
    args.enable_auto_tool_choice, args.tools_shown = True, parser is not None and _can_be(parser, tokenizer)
    args.tool_call_parser = parser if args.tools_shown else FORCED


def parser_for(template: str) -> str | None:
    """The parser for a chat template; None if the template tells the base nothing of tools, or in a form that no parser here reads."""
    if "tools" not in template:
        return None
    return next((parser for mark, parser in MARKS if mark in template), None)


def _can_be(parser: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a parser finds the tokens that it needs."""
    from vllm.tool_parsers import ToolParserManager

    try:
        ToolParserManager.get_tool_parser(parser)(tokenizer)
    except Exception:  # each parser has its own
        return False
    return True


def _template(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the template that the server will use; empty: there is none."""
    if args.chat_template:
        given = Path(args.chat_template)
        return given.read_text() if given.is_file() else str(args.chat_template)
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""
