"""Tools: the parser that the base's template asks for; calls are answered, and forced ones follow their schema."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import chat
from vllm.tool_parsers import ToolParserManager

from memdec.decoders.tokenizer import CHAT_TEMPLATE
from memdec.server.api.body import ChatCompletion, ResponseRequest
from memdec.server.api.fields import require_shown_tools
from memdec.server.errors import RequestError
from memdec.server.launch.tools import FORCED, MARKS, choose_parser, parser_for

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("weather", "traffic")]
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]


def test_parsers() -> None:
    """Every one that is chosen is one of vLLM's; ours' template teaches hermes' form."""
    assert {parser for _, parser in MARKS} | {FORCED} <= set(ToolParserManager.list_registered())
    assert parser_for(CHAT_TEMPLATE) == "hermes"
    assert parser_for("{% for tool in tools %}<tools>{% endfor %}<tool_call>\n<function=example>") == "qwen3_coder"
    assert parser_for("{% for m in messages %}{{ m.content }}<tool_call>{% endfor %}") is None, "no place for tools"
    assert parser_for("{{ tools }} and no mark") is None


def chosen(folder: Path, **given: Any) -> Namespace:
    """The options after the choice."""
    args = Namespace(**{"tool_call_parser": None, "enable_auto_tool_choice": False, "chat_template": None, **given})
    choose_parser(args, folder)
    return args


def test_the_choice(toys: Path, tmp_path: Path) -> None:
    """From the base's template or the one that is given; what the user says stays; calls that can only be forced are not shown."""
    assert chosen(toys / "base") == Namespace(tool_call_parser="hermes", enable_auto_tool_choice=True, chat_template=None, tools_shown=True)
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert not chosen(toys / "base", chat_template=str(tmp_path / "plain.jinja")).tools_shown
    assert chosen(toys / "base", tool_call_parser="mistral").tool_call_parser == "mistral"
    needs_tokens = "{{ tools }}[TOOL_CALLS]"
    assert not chosen(toys / "base", chat_template=needs_tokens).tools_shown, "mistral's parser needs a token that the toys lack"


@pytest.mark.parametrize("kind", [ChatCompletion, ResponseRequest])
def test_tools_that_a_base_would_never_hear_of(kind: Any) -> None:
    """Refused by name; without tools, or with a choice that needs no hearing, all is well."""
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if kind is ChatCompletion else {"input": "x"}
    tools = TOOLS if kind is ChatCompletion else FLAT
    with pytest.raises(RequestError, match="chat template") as caught:
        require_shown_tools(kind(**asked, tools=tools), shown=False)
    assert caught.value.param == "tools"
    require_shown_tools(kind(**asked, tools=tools), shown=True)
    for fields in ({}, {"tools": tools, "tool_choice": "none"}, {"tools": tools, "tool_choice": "required"}):
        require_shown_tools(kind(**asked, **fields), shown=False)


@pytest.mark.parametrize("domain", [None, "a"])
def test_tools_are_answered(http: httpx.Client, domain: str | None) -> None:
    """Without force, a model that knows nothing of tools says something; the tools are in its prompt."""
    plain, shown = chat(http, domain=domain), chat(http, domain=domain, tools=TOOLS)
    assert shown.status_code == 200, shown.text
    assert shown.json()["usage"]["prompt_tokens"] > plain.json()["usage"]["prompt_tokens"]
    told = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]}, {"role": "tool", "tool_call_id": "1", "content": "rain"}]  # fmt: skip
    assert chat(http, domain=domain, tools=TOOLS, messages=told).status_code == 200
