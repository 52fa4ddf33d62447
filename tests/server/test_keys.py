"""The file of API keys, and the options that limit clients: what is taken, and what is refused in one line that tells no key."""

import re
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT

from memdec.server.api.keys import find, read_keys
from memdec.server.api.limits import QUEUED, Limits
from memdec.server.errors import DomainNotAllowed, StartupError, UnknownDomain
from memdec.server.launch.options import check, parse
from memdec.server.launch.vllm_arguments import bound_queue
from memdec.server.routing.domains import Domain, Domains


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where keys go; nobody else can read it."""
    path = tmp_path / "keys"
    path.touch(0o600)
    return path


def test_a_good_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Comments, options in any order, and a key with none; the secrets are not in what is kept."""
    file.write_text("# ours\n\nsk-ops\n  sk-lab  domains=a,b name=lab\nsk-x concurrent=3 domains=\n")
    keys = read_keys(file)
    assert [(k.name, k.domains, k.concurrent) for k in keys] == [
        ("line-3", None, None), ("lab", frozenset("ab"), None), ("line-5", frozenset(), 3),
    ]  # fmt: skip
    assert "sk-" not in repr(keys)
    assert find(keys, b"Bearer sk-lab") is keys[1]
    assert find(keys, b"bearer  sk-ops ") is keys[0]
    for wrong in (b"", b"Bearer", b"Bearer sk-la", b"Basic sk-lab", b"sk-lab", b"Bearer sk-lab sk-ops", b"Bearer \xff"):
        assert find(keys, wrong) is None
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "no key"),
        ("# nothing\n\n", "no key"),
        ("sk-secret\nsk-other\nsk-secret\n", "line 3: its key is given twice"),
        ("sk-secret name=x\nsk-other name=x\n", "line 2: its name 'x' is given twice"),
        ("sk-secret name=\n", "line 1: the name ''"),
        ("sk-secret domains=a,,b\n", "line 1: the domain ''"),
        ("sk-secret domains=../a\n", "line 1: the domain '../a'"),
        ("sk-secret concurrent=0\n", "line 1: concurrent"),
        ("sk-secret concurrent=many\n", "line 1: concurrent"),
        ("sk-secret sk-other\n", "line 1: option 1"),
        ("sk-secret name=a name=b\n", "line 1: option 2"),
        ("sk-sécret\n", "line 1: the key has other than printable ASCII"),
    ],
)
def test_files_that_are_refused(file: Path, content: str, told: str) -> None:
    """By line, without a key in the message."""
    file.write_text(content)
    with pytest.raises(StartupError) as caught:
        read_keys(file)
    message = str(caught.value)
    assert told in message and str(file) in message and "\n" not in message
    assert "sk-" not in message


def test_files_that_cannot_be_read(file: Path, tmp_path: Path) -> None:
    """Absent, a folder, not text."""
    file.write_bytes(b"\xff\xfe")
    for path in (tmp_path / "absent", tmp_path, file):
        with pytest.raises(StartupError, match="--api-key-file"):
            read_keys(path)


def test_a_file_that_everybody_can_read(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Warned of, and read."""
    file.write_text("sk-secret\n")
    file.chmod(0o644)
    assert len(read_keys(file)) == 1
    told = capsys.readouterr().err
    assert "chmod 600" in told and "sk-" not in told


def parsed(*words: str) -> Limits:
    """Limits of a command line."""
    line = parse(["base", *words])
    check(line)
    return line.limits


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--max-body-bytes", "0"), "--max-body-bytes 0: wanted a number from 1"),
        (("--max-choices", "-1"), "--max-choices -1"),
        (("--max-prompt-tokens", "0"), "--max-prompt-tokens 0"),
        (("--max-concurrent-per-key", "2"), "there are no keys"),
        (("--log-prompts",), "--log-json"),
    ],
)
def test_options_that_cannot_be(words: tuple[str, ...], told: str) -> None:
    """Named, with what is wanted."""
    with pytest.raises(StartupError) as caught:
        parsed(*words)
    assert told in str(caught.value)


def test_the_queue_has_a_bound() -> None:
    """Unless the user names another; one that the largest request never fits is refused."""
    limits = parsed()
    for given, kept in ((None, 1024), (200, 200)):
        args = Namespace(max_num_queued_reqs=given)
        bound_queue(args, limits)
        assert args.max_num_queued_reqs == kept
    with pytest.raises(StartupError, match="--max-choices"):
        bound_queue(Namespace(max_num_queued_reqs=100), limits)


def test_keys_of_both_kinds(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the file and from --api-key; a domain that isn't loaded is warned of, since it may be loaded later."""
    file.write_text("sk-lab domains=a,law name=lab\n")
    keys = check(parse(["base", "--decoder", f"a={file.parent}", "--api-key-file", str(file), "--api-key", "sk-one", ""])).keys
    assert [key.name for key in keys] == ["key-1", "lab"]
    assert "'law'" in capsys.readouterr().err


def test_domains_of_one_key() -> None:
    """The others are withheld: forbidden by name, and in no list of valid ones."""
    of = {name: Domain(name, "", 0.5, True, "", 0, "", {}) for name in ("a", "b", "c")}
    seen = Domains("base", tuple(of.values())).only({"a", "c"}.__contains__)
    assert seen.names == ["a", "c"] and seen.find("a") is of["a"]
    with pytest.raises(DomainNotAllowed, match=r"'b'. Valid domains: a, c\."):
        seen.find("b")
    with pytest.raises(UnknownDomain, match=r"Valid domains: a, c\."):
        seen.find("d")


def test_the_operations_page(file: Path) -> None:
    """Names every option with its default, and its file of keys is one."""
    page = (ROOT / "docs" / "operations.md").read_text()
    for f in fields(Limits):
        assert f"`--{f.name.replace('_', '-')}" in page or f"--{f.name.replace('_', '-')} " in page, f.name
    assert f"| {Limits().max_choices} |" in page and f"| {QUEUED} |" in page
    file.write_text("\n".join(re.findall(r"^    (sk-.*)$", page, re.M)))
    assert [(k.name, k.domains, k.concurrent) for k in read_keys(file)] == [
        ("operator", None, None), ("lab", frozenset({"biomed"}), 4), ("visitor", frozenset(), None),
    ]  # fmt: skip
