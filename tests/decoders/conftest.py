"""An n-gram package that the command made, and the text it was made from, for all tests of such packages."""

import sysconfig
from pathlib import Path

import pytest

from memdec.cli import main

LIBRARY = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[40:80]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ready-made splits, from the standard library's own files; train holds a document in a file of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    for split, files in (("train", LIBRARY[:20]), ("valid", LIBRARY[20:28]), ("test", LIBRARY[28:])):
        (folder / split).mkdir()
        for file in files:
            (folder / split / file.name).write_text(file.read_text(errors="ignore")[:6000])
    return folder


@pytest.fixture(scope="session")
def built(corpus: Path, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package made by the command."""
    out = tmp_path_factory.mktemp("built") / "code"
    words = ["ngram", "code", "--corpus", str(corpus), "--base", str(toys / "base"), "--out", str(out), "--windows", "4", "--with-sources"]
    assert main([*words, "--licence", "PSF"]) == 0
    return out
