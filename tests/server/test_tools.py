"""Tools: the parser that the base's template asks for; calls are answered, and forced ones follow their schema."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import httpx
import pytest
import xgrammar
from asking import chat
from toys import BASE_ROWS
from vllm.parser.parser_manager import ParserManager
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.tool_parsers import ToolParserManager

from memdec.decoders.new_tokenizer import CHAT_TEMPLATE
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.server.api.body import ChatCompletion, ResponseRequest
from memdec.server.api.fields import pin_forced_calls, require_shown_tools
from memdec.server.engine.tool_calls import bounded
from memdec.server.errors import RequestError
from memdec.server.launch.tools import FORCED, MARKS, choose_parser, parser_for

pytestmark = pytest.mark.engine

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


def test_structural_tags_bound_their_white_space() -> None:
    """JSON inside of them, however deep; a client's own bound, other formats and what a schema says stay."""
    schema = {"type": "object", "properties": {"type": {"const": "json_schema"}}}
    tag = {
        "type": "structural_tag",
        "format": {"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": schema}, "end": ""},
    }
    given = SamplingParams(structured_outputs=StructuredOutputsParams(structural_tag=json.dumps(tag)))
    found = json.loads(bounded(given).structured_outputs.structural_tag)
    assert found["format"]["content"] == {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": 1}
    assert json.loads(given.structured_outputs.structural_tag) == tag, "the caller's stays"  # type: ignore[union-attr, arg-type]
    own = {"type": "json_schema", "json_schema": True, "max_whitespace_cnt": 7}
    kept = SamplingParams(structured_outputs=StructuredOutputsParams(structural_tag=json.dumps(own)))
    assert json.loads(bounded(kept).structured_outputs.structural_tag) == own
    for params in (SamplingParams(), SamplingParams(structured_outputs=StructuredOutputsParams(json=schema))):
        assert bounded(params) is params


def test_forced_calls_are_strict() -> None:
    """Unless the client says otherwise; those that the model may choose stay as they were."""
    for choice, strict, wanted in (("required", None, True), ("required", False, False), ("auto", None, None)):
        chats = ChatCompletion(messages=[{"role": "user", "content": "x"}], tool_choice=choice, tools=[{"type": "function", "function": {"name": "f", "strict": strict}}])  # fmt: skip
        pin_forced_calls(chats)
        assert chats.tools[0].function.strict is wanted
        flat = ResponseRequest(input="x", tool_choice=choice, tools=[{"type": "function", "name": "f", "parameters": {}, "strict": strict}])
        pin_forced_calls(flat)
        assert flat.tools[0].strict is wanted


def test_the_grammar_of_a_forced_call(toys: Path) -> None:
    """As vLLM makes it for hermes' form: arguments that the schema allows, without white space to fill an answer with."""
    tokenizer = load_tokenizer(toys / "base")
    parser = ParserManager.get_parser(tool_parser_name="hermes", enable_auto_tools=True, tokenizer=tokenizer)
    chats = ChatCompletion(messages=[{"role": "user", "content": "x"}], tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    pin_forced_calls(chats)
    asked = parser(tokenizer, chats.tools).adjust_request(chats)
    tag = bounded(SamplingParams(structured_outputs=asked.structured_outputs)).structured_outputs.structural_tag
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=BASE_ROWS))
    grammar = compiler.compile_structural_tag(tag)
    for arguments, allowed in (
        ('{"city": "Rome", "days": 3}', True),
        ('{"city": "Paris", "days": 3}', False),
        ('{"city": "Rome"}', False),
        ('{"city": "Rome", "days": 30}', False),
        ('{  "city": "Rome", "days": 3}', False),
    ):
        call = f'<tool_call>{{"name": "weather", "arguments": {arguments}}}</tool_call>'
        assert xgrammar.GrammarMatcher(grammar).accept_string(call) is allowed, arguments
