"""An n-gram package that the command makes of the standard library's own files."""

import sysconfig
from pathlib import Path

from memdec.cli import main

LIBRARY = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[40:80]


def write_corpus(folder: Path) -> Path:
    """Write ready-made splits; each document is in a file of its own."""
    for split, files in (("train", LIBRARY[:20]), ("valid", LIBRARY[20:28]), ("test", LIBRARY[28:])):
        (folder / split).mkdir()
        for file in files:
            (folder / split / file.name).write_text(file.read_text(errors="ignore")[:6000])
    return folder


def build_package(corpus: Path, toys: Path, out: Path) -> Path:
    """Make a package `code` by the command."""
    words = ["ngram", "code", "--corpus", str(corpus), "--base", str(toys / "base"), "--out", str(out), "--windows", "4", "--with-sources"]
    assert main([*words, "--licence", "PSF"]) == 0
    return out
