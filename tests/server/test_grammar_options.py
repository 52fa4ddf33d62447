"""`--structured-outputs-config` on the command line, and whose fault an answer's failure is."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import FinishReason
from vllm.v1.engine.output_processor import OutputProcessor

from memdec.server.engine.timed_outputs import TimedOutputProcessor
from memdec.server.launch.grammar_options import OPTION, with_defaults


@pytest.mark.parametrize(
    ("given", "backend", "compact"),
    [
        ([], "xgrammar", True),
        ([f"{OPTION}.disable_any_whitespace", "true"], "xgrammar", True),
        (["--structured_outputs_config.disable_any_whitespace=false", "--port", "1"], "xgrammar", False),
        ([OPTION, '{"disable_any_whitespace": true}'], "xgrammar", True),
        ([f'{OPTION}={{"backend": "guidance"}}'], "guidance", True),
        ([f"{OPTION}.backend", "auto"], "xgrammar", True),
        ([f"{OPTION}.backend=outlines"], "outlines", None),
    ],
)
def test_defaults(given: list[str], backend: str, compact: bool | None) -> None:
    """Either spelling; what the user has decided stays."""
    *rest, last = with_defaults(["model", *given])
    assert rest == ["model", *[word for word in given if word in ("--port", "1")]]
    config = json.loads(last.removeprefix(f"{OPTION}="))
    assert (config["backend"], config.get("disable_any_whitespace")) == (backend, compact)


def test_what_is_no_json_is_for_vllm_to_refuse() -> None:
    """As it came."""
    assert with_defaults(["model", OPTION, "{"]) == ["model", OPTION, "{"]


def test_only_a_grammar_without_a_next_token_is_the_clients_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure with tokens is that; one without is the server's own, and stays a 500."""
    told: dict[str, list[Any]] = {"stuck": [], "failed": [], "fine": []}
    processor: Any = object.__new__(TimedOutputProcessor)
    processor.request_states = {name: SimpleNamespace(queue=SimpleNamespace(put=puts.append)) for name, puts in told.items()}
    monkeypatch.setattr(OutputProcessor, "process_outputs", lambda self, outputs: self.request_states.clear())
    outputs = [
        SimpleNamespace(request_id="stuck", finish_reason=FinishReason.ERROR, new_token_ids=[5]),
        SimpleNamespace(request_id="failed", finish_reason=FinishReason.ERROR, new_token_ids=[]),
        SimpleNamespace(request_id="fine", finish_reason=None, new_token_ids=[5]),
        SimpleNamespace(request_id="gone", finish_reason=FinishReason.ERROR, new_token_ids=[5]),
    ]
    processor.process_outputs(outputs)
    assert isinstance(told["stuck"][0], VLLMValidationError) and not told["failed"] and not told["fine"]
