"""The command line: one field one option, refused early, read from files too, and carried whole to vLLM's own launcher."""

import asyncio
import shlex
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from assembled import ask, assembled
from command_line import given

from memdec import cli, flags
from memdec.flags import flag
from memdec.server.api.keys import Key
from memdec.server.api.limits import Limits
from memdec.server.errors import StartupError
from memdec.server.launch import greeting, running
from memdec.server.launch.front_end import HONOURED, REFUSED, REFUSED_OF_THE_ENGINE, REFUSED_WITH_DECODERS, refuse_without_effect
from memdec.server.launch.options import ADMIN_KEY, OURS, parse
from memdec.server.launch.vllm_arguments import parse_vllm
from memdec.server.launch.vllm_command import NOT_CARRIED, require_one_process, settings_of, vllm_command

HEAVY = ("torch", "transformers", "vllm", "numpy", "fastapi")


@dataclass(frozen=True)
class Sample:
    """One field of each kind."""

    number: int | None = flag(None, "a number", least=1)
    share: float = flag(0.5, "50 %", "SHARE", least=0, most=1)
    folder: tuple[Path, ...] = flag((), "folders", "DIR")
    name: str = flag("x", "a name", "NAME")
    quick: bool = flag(False, "faster")


def sample(*words: str) -> Sample:
    """A command line of these options."""
    from argparse import ArgumentParser

    parser = ArgumentParser(allow_abbrev=False)
    flags.add(parser, Sample)
    parser.format_help()
    return flags.read(Sample, parser.parse_args(words))


def test_one_field_is_one_option() -> None:
    """Read, bounded, and written out again."""
    assert sample() == Sample() and flags.words(Sample()) == []
    given = sample("--number", "3", "--share=0.25", "--folder", "a", "--folder", "b", "--quick")
    assert given == Sample(3, 0.25, (Path("a"), Path("b")), "x", True)
    assert sample(*flags.words(given)) == replace(given, folder=(Path("a").absolute(), Path("b").absolute()))
    for words, told in (
        (("--number", "0"), "--number 0: wanted a number from 1"),
        (("--share", "1.5"), "from 0 to 1"),
        (("--share", "nan"), "nan: wanted"),
    ):
        with pytest.raises(StartupError, match=told):
            sample(*words)


REFUSALS = [
    (["--max-choices", "0"], "--max-choices 0: wanted a number from 1"),
    (["--max_body_bytes", "-1"], "--max-body-bytes -1"),
    (["--baseline-sample-rate", "nan"], "--baseline-sample-rate nan: wanted a number from 0 to 1"),
    (["--speculate", "17"], "--speculate 17: wanted a number from 0 to 16"),
    (["--decoder", "a"], "--decoder a: wanted NAME=PATH"),
    (["--decoder", "a=/nowhere/at/all"], "/nowhere/at/all: no such folder"),
    (["--decoder-dir", "/nowhere"], "--decoder-dir /nowhere"),
    (["--datastore", "é=x"], "--datastore é=x"),
    (["--api-key-file", "/nowhere"], "--api-key-file /nowhere"),
    (["--log-prompts"], "--log-prompts: wanted with --log-json"),
    (["--max-concurrent-per-key", "2"], "there are no keys"),
    (["--max-decoders", "2"], "has no meaning without --enable-domain-updates"),
    (["--config", "/nowhere.yaml"], "--config /nowhere.yaml"),
]


def test_bad_options_are_refused_before_heavy_imports() -> None:
    """Seconds earlier: in one process, in which nothing heavy is loaded after all of them."""
    script = f"""
import sys
from memdec.cli import main
for words in {[words for words, _ in REFUSALS]!r}:
    assert main(["serve", "base", *words]) == 1
assert main([]) == 0
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    lines = done.stderr.strip().splitlines()
    assert len(lines) == len(REFUSALS)
    for line, (_, told) in zip(lines, REFUSALS, strict=True):
        assert line.startswith("memdec: error: ") and told in line


def test_memdec_alone_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command is in it."""
    assert cli.main([]) == 0
    page = capsys.readouterr().out
    for command in ("serve", "build", "package", "retrieval", "verify", "evaluate", "pretrain"):
        assert f"    {command} " in page


def test_ours_may_come_from_the_configuration_file(tmp_path: Path) -> None:
    """With dashes or underscores, alone or as lists; what is on the command line wins; vLLM's parser is left its own."""
    file = tmp_path / "serve.yaml"
    file.write_text(
        "max-choices: 7\nmax_body_bytes: 9\nlog-json: true\ndecoder: [a=x, b=y]\nport: 8123\nenforce-eager: false\napi-key: [k, l]\n"
    )
    for words in (["--config", str(file)], [f"--config={file}"]):
        line = parse(["base", *words, "--max-choices", "8"])
        assert line.limits == Limits(max_choices=8, max_body_bytes=9, log_json=True) and line.options.decoder == ("a=x", "b=y")
        assert line.api_keys == ("k", "l")
        assert {"--port", "--max-choices", "--config"} <= line.given and "--enforce-eager" not in line.given
        args = parse_vllm(line.words)
        assert args.port == 8123 and args.model == "base" and not OURS & {f"--{name.replace('_', '-')}" for name in vars(args)}
    for text in ("- a\n", "a: [\n"):
        file.write_text(text)
        with pytest.raises(StartupError, match="--config"):
            parse(["base", "--config", str(file)])


def test_underscores_and_abbreviations() -> None:
    """vLLM takes `_` for `-`, so ours do; what is only the beginning of an option is none."""
    assert parse(["base", "--max_choices", "3", "--max_num_seqs=4"]).limits.max_choices == 3
    line = parse(["base", "--max-choi", "3"])
    assert line.limits.max_choices == 128
    with pytest.raises(SystemExit):
        parse_vllm(line.words)


@pytest.fixture
def everything(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every option of ours that a server can be given at once."""
    monkeypatch.setenv(ADMIN_KEY, "sk-admin")
    (tmp_path / "keys").touch(0o600)
    (tmp_path / "keys").write_text("sk-lab name=lab domains=a\n")
    monkeypatch.chdir(tmp_path)
    limits = "--max-body-bytes 1000 --max-prompt-tokens 5 --max-output-tokens 6 --max-choices 7 --max-concurrent-per-key 2 --max-tokens-per-key 800 --step-timeout 61 --strict-fields --domain-load-timeout 9"
    words = f"--api-key-file keys --log-json --log-prompts --baseline-sample-rate 0.25 --enable-domain-updates {limits}".split()
    return [*words, "--domain-root", str(toys), "--max-decoders", "3", "--api-key", "sk-one", "--speculate", "3"]


def test_the_printed_command_carries_all_of_ours(toys: Path, everything: list[str]) -> None:
    """Settings made from it, by vLLM's parser alone, are those of `memdec serve`. A new option is carried too, or fails here."""
    line, settings, args = given(toys, *everything)
    for options, without in ((line.options, NOT_CARRIED), (line.limits, {})):
        for f in fields(options):
            assert f.name in without or getattr(options, f.name) != f.default, f.name
    words = shlex.split(vllm_command(args, line, settings))
    theirs = parse_vllm(words[words.index("serve") + 1 :])
    again = settings_of(theirs)
    absolute = replace(settings.limits, api_key_file=Path("keys").absolute())  # the command may run elsewhere
    assert replace(again, models=settings.models) == replace(settings, limits=absolute)
    assert replace(again.models, positions=settings.models.positions) == settings.models
    assert "sk-admin" not in " ".join(words)
    for name in (
        "max_num_queued_reqs",
        "scheduling_policy",
        "scheduler_cls",
        "worker_cls",
        "load_format",
        "host",
        "shutdown_timeout",
        "max_model_len",
    ):
        assert getattr(theirs, name) == getattr(args, name), name
    assert theirs.logging_config.formatter == "json" and theirs.disable_uvicorn_access_log


def test_what_the_printed_command_cannot_carry(toys: Path, everything: list[str]) -> None:
    """Refused by name: a secret for all to read, and state that several processes would each have of their own."""
    line, settings, args = given(toys, *everything, "--admin-key", "sk-admin")
    with pytest.raises(StartupError, match="--admin-key"):
        vllm_command(args, line, settings)
    require_one_process(settings, 1)
    with pytest.raises(StartupError, match="--enable-domain-updates: wanted --api-server-count 1"):
        require_one_process(settings, 2)
    with pytest.raises(StartupError, match="--max-concurrent-per-key"):
        require_one_process(replace(settings, updates=None), 2)
    with pytest.raises(StartupError, match="--hf-overrides"):
        settings_of(Namespace(hf_overrides=None))


def declared() -> set[str]:
    """All that vLLM's parser knows besides the engine's own options."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    return {action.dest for action in parser._actions} - {f.name for f in fields(AsyncEngineArgs)} - {"help"}


def test_all_options_of_vllms_front_end() -> None:
    """Each is in one of two lists; those that are refused are refused by name, the negative form too."""
    engine = {"tokens_only", "data_parallel_multi_port_external_lb"}  # declared for both
    assert declared() == (HONOURED | REFUSED.keys()) - engine
    assert not HONOURED & REFUSED.keys()
    for name in REFUSED | REFUSED_OF_THE_ENGINE:
        option = f"--{name.replace('_', '-')}"
        for spelt in (option, f"--no-{option[2:]}"):
            with pytest.raises(StartupError, match=f"^{spelt}: "):
                refuse_without_effect({"--port", spelt}, decoders=False)
    for name in REFUSED_WITH_DECODERS:
        refuse_without_effect({f"--{name.replace('_', '-')}"}, decoders=False)
        with pytest.raises(StartupError, match=name.replace("_", "-")):
            refuse_without_effect({f"--{name.replace('_', '-')}"}, decoders=True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--served-model-name", "x", "y"], "--served-model-name"),
        (["--baseline-sample-rate", "0.5", "--scheduling-policy", "fcfs"], "--scheduling-policy"),
        (["--scheduler-cls", "x.Y"], "--scheduler-cls"),
        (["--api-server-count", "2"], "--api-server-count 2"),
        (["--no-enable-flash-late-interaction"], "--no-enable-flash-late-interaction"),
        (["--enable-log-outputs"], "--enable-log-outputs requires --enable-log-requests"),
    ],
)
def test_values_that_memories_cannot_have(words: list[str], told: str, toys: Path) -> None:
    """One line that names the option, through the whole way."""
    with pytest.raises(StartupError, match=told):
        given(toys, *words)


def test_the_worker_shares_a_process_only_where_it_is_alone(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank of two in the engine's process would wait for the other for ever."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    assert given(toys, "--enforce-eager")[2].distributed_executor_backend == "uni"
    assert given(toys, "--enforce-eager", "--tensor-parallel-size", "2")[2].distributed_executor_backend is None


def test_the_greeting_says_where_the_server_is() -> None:
    """A curl that works, for a socket and for IPv6 too."""
    where = Namespace(uds=None, ssl_certfile=None, host="::1", port=8000)
    assert greeting.address(where) == ("http://[::1]:8000", "")
    where.host = "0.0.0.0"
    assert greeting.address(where) == ("http://127.0.0.1:8000", "")
    where.uds = "/run/memdec"
    assert greeting.address(where) == ("http://localhost", "--unix-socket /run/memdec ")


def test_a_prefix_changes_nothing_but_paths() -> None:
    """With --root-path, a request may have the prefix or not: the same key opens the same routes, and the description names it."""
    keys = [Key.of("all", "all"), Key.of("some", "some", frozenset("a"))]
    with assembled(keys, updates=False, root_path="/pre") as (app, _):
        for path in ("/metrics", "/v1/models"):
            for prefix in ("", "/pre"):
                for key, wanted in ((None, 401), ("all", 200), ("some", 403 if path == "/metrics" else 200)):
                    head = ((b"authorization", f"Bearer {key}".encode()),) if key else ()
                    assert asyncio.run(ask(app, "GET", prefix + path, *head))[0] == wanted, (prefix, path, key)
    with assembled(marked=False, root_path="/pre") as (app, _):
        assert app.root_path == "/pre"


def test_uvicorn_is_told_all_of_vllms_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates that are read anew, ciphers, and which paths are not logged."""
    told: dict[str, Any] = {}

    async def serve_http(app: Any, **options: Any) -> None:
        told.update(options)

    monkeypatch.setattr(running, "serve_http", serve_http)
    words = [
        "--ssl-ciphers",
        "X",
        "--enable-ssl-refresh",
        "--ssl-certfile",
        "c",
        "--disable-access-log-for-endpoints",
        "/health",
        "--uvicorn-log-level",
        "error",
    ]
    nothing: Any = None
    asyncio.run(running._serve(nothing, nothing, parse_vllm(["base", *words]), log_json=False))
    assert (told["ssl_ciphers"], told["enable_ssl_refresh"], told["ssl_certfile"], told["log_level"]) == ("X", True, "c", "error")
    assert "/health" in str(told["log_config"])
    asyncio.run(running._serve(nothing, nothing, parse_vllm(["base", "--disable-uvicorn-access-log"]), log_json=False))
    assert told["access_log"] is False
