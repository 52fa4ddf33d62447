"""`memdec ngram` as a user runs it: a package, what it says, added and removed documents, and bad input in one line each."""

import json
import re
import resource
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ngram_package import LIBRARY, build_package, write_corpus
from ngrams import Reference, make_memory

from memdec.cli import _parser, main
from memdec.decoders.build import Build
from memdec.decoders.build_options import BuildOptions
from memdec.decoders.corpus import Corpus
from memdec.decoders.reading.errors import CorpusError, DecoderError, ManifestError, OptionError, PackageError
from memdec.decoders.reading.ngram import NgramMemory
from memdec.decoders.reading.ngram_folder import LAMBDAS, index_folder, open_or_index, vocabulary_of
from memdec.decoders.reading.ngram_index import Vocabulary
from memdec.decoders.reading.tokenizer import end_of_document, load_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ready-made splits, from the standard library's own files; train holds a document in a file of its own."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def built(corpus: Path, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package made by the command."""
    return build_package(corpus, toys, tmp_path_factory.mktemp("built") / "code")


def rows_of(memory: NgramMemory) -> Iterator[tuple[str, list[int]]]:
    """A package's documents by their ids, without end tokens."""
    for number, shard in enumerate(memory.shards):
        names = json.loads((memory.path / f"shard-{number}" / "documents.json").read_text())["documents"]
        for name, start, stop in zip(names, [0, *shard.ends[:-1]], shard.ends, strict=True):
            yield name, shard.ids[start : stop - 1].tolist()


def reference_of(rows: dict[str, list[int]], memory: NgramMemory) -> Reference:
    """Plain counting of documents, with a memory's order and weights."""
    return Reference(list(rows.values()), memory.end, memory.order, weights=memory.weights)


def require_same(memory: NgramMemory, reference: Reference, contexts: list[list[int]]) -> None:
    """The memory's distributions are the reference's."""
    base = np.random.default_rng(0).dirichlet(np.ones(memory.vocabulary))
    assert memory.discounts == pytest.approx(reference.discounts, abs=1e-12)
    for context in contexts:
        found = memory.continuations(context)
        whole = found.base_mass * base
        whole[found.token_ids] += found.probabilities
        assert np.abs(whole - reference.distribution(context, base.tolist())).max() < 1e-6


def test_the_package_says_what_it_is(built: Path, toys: Path) -> None:
    """Tuned beside the base, measured, with licence, hashes and card; the mixture is no worse than the base where it was tuned."""
    memory = NgramMemory.open(built)
    assert (memory.name, memory.tuned, memory.sources) == ("code", True, True)
    assert memory.tokenizer == vocabulary_of(load_tokenizer(toys / "base")).token_map
    assert 2 <= memory.order <= 8 and 0 <= memory.lambda_ < 1
    assert memory.perplexity["valid mixture"] <= memory.perplexity["valid base"]
    assert "PSF" in (built / "README.md").read_text()
    rows = dict(rows_of(memory))
    assert len(rows) == 20 and all(name.startswith("train/") for name in rows)
    require_same(memory, reference_of(rows, memory), [row[50:57] for row in rows.values()])


def test_removed_and_added_documents(built: Path, toys: Path, tmp_path: Path) -> None:
    """Without a document the memory is the one that never saw it, and its tokens are gone from the files; added again, all counts are back."""
    out = tmp_path / "code"
    shutil.copytree(built, out)
    before = dict(rows_of(NgramMemory.open(out)))
    name = sorted(before)[3]
    assert main(["ngram", "code", "--out", str(out), "--remove", name]) == 0
    without = NgramMemory.open(out)
    left = {n: row for n, row in before.items() if n != name}
    assert dict(rows_of(without)) == left
    contexts = [before[name][at : at + 6] for at in range(0, 60, 5)] + [row[9:14] for row in left.values()]
    require_same(without, reference_of(left, without), contexts)

    more = tmp_path / "more" / "train"
    more.mkdir(parents=True)
    (more / Path(name).name).write_text(next(f for f in LIBRARY if f.name == Path(name).name).read_text(errors="ignore")[:6000])
    words = ["ngram", "code", "--out", str(out), "--corpus", str(more.parent), "--base", str(toys / "base"), "--append"]
    assert main(words) == 0
    again = NgramMemory.open(out)
    assert len(again.shards) == 2 and dict(rows_of(again)) == before
    require_same(again, reference_of(before, again), contexts)
    assert again.lambda_ == NgramMemory.open(built).lambda_ and again.revision != without.revision
    context, matched = before[name][200:210], again.order - 1
    found = again.occurrences(context)
    assert found and all(before[o.document][o.offset : o.offset + matched] == context[-matched:] for o in found)
    assert main(["ngram", "code", "--out", str(out), "--remove", name]) == 0
    assert len(NgramMemory.open(out).shards) == 1  # an empty shard isn't kept


def test_bad_commands_are_one_line_each(built: Path, toys: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, a message that names what is wrong, and a package that is as it was."""
    out, revision = tmp_path / "code", NgramMemory.open(built).revision
    shutil.copytree(built, out)
    at, source = ["--out", str(out)], ["--corpus", str(corpus), "--base", str(toys / "base")]
    every = [word for name, _ in rows_of(NgramMemory.open(out)) for word in ("--remove", name)]
    for words, wanted in (
        (["code", *at, "--remove", "nowhere.txt"], "no document of this id"),
        (["code", *at, *every], "delete the folder"),
        (["other", *at, "--remove", every[1]], "is of 'code'"),
        (["code", *at, "--remove", every[1], "--base", "x"], "--base: has no effect"),
        (["code", *at, *source, "--append", "--windows", "3"], "--windows: has no effect"),
        (["code", *at, *source, "--append"], "is in"),
        (["code", *at], "--corpus: is missing"),
        (["code", *at, *source, "--windows", "0"], "wanted a whole number above 0"),
        (["code", "--out", str(tmp_path / "none"), "--remove", "a"], "no such folder"),
    ):
        assert main(["ngram", *words]) == 1, words
        error = capsys.readouterr().err
        assert wanted in error and "Traceback" not in error
        assert len([line for line in error.splitlines() if line.startswith("memdec: error")]) == 1
    assert NgramMemory.open(out).revision == revision
    assert [p.name for p in tmp_path.iterdir()] == ["code"]


def test_a_changed_package_is_not_built_over(
    built: Path, toys: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new build would bring removed documents back."""
    out = tmp_path / "code"
    shutil.copytree(built, out)
    name = next(name for name, _ in rows_of(NgramMemory.open(out)))
    assert main(["ngram", "code", "--out", str(out), "--remove", name]) == 0
    assert main(["ngram", "code", "--out", str(out), "--corpus", str(corpus), "--base", str(toys / "base")]) == 1
    assert "added or removed" in capsys.readouterr().err


def test_a_build_makes_one_in_passing(corpus: Path, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the decoder's package, the one that the command makes of the same tokens, to the byte; a changed one is not built over."""
    base, text = toys / "base", Corpus.open(str(corpus))
    build = Build("code", text, base, tmp_path / "out", tmp_path / "work", BuildOptions(with_sources=True, licence="PSF"))
    assert build.run("ngram") == tmp_path / "out.ngram"
    words = ["ngram", "code", "--corpus", str(corpus), "--base", str(base), "--work", str(tmp_path / "work"), "--licence", "PSF"]
    assert main([*words, "--out", str(tmp_path / "own"), "--with-sources"]) == 0
    assert {f.relative_to(tmp_path / "own"): f.read_bytes() for f in files_of(tmp_path / "own")} == {
        f.relative_to(tmp_path / "out.ngram"): f.read_bytes() for f in files_of(tmp_path / "out.ngram")
    }
    assert replace(build, options=BuildOptions(no_ngram=True), out=tmp_path / "bare").run("tokens") == tmp_path / "work" / "tokens"
    assert not list(tmp_path.glob("bare*"))

    (document, _), *_ = rows_of(NgramMemory.open(tmp_path / "out.ngram"))
    assert main(["ngram", "code", "--out", str(tmp_path / "out.ngram"), "--remove", document]) == 0
    revision = NgramMemory.open(tmp_path / "out.ngram").revision
    with pytest.raises(OptionError, match=r"out\.ngram: documents were added or removed there"):
        build.run("ngram")
    assert NgramMemory.open(tmp_path / "out.ngram").revision == revision


def files_of(folder: Path) -> list[Path]:
    """A package's files, but for the record of seconds."""
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "manifest.json")


def test_a_folder_is_indexed_once(corpus: Path, toys: Path, tmp_path: Path) -> None:
    """By the hash of its text: a changed document makes another index; a damaged one in the cache is made again."""
    tokenizer, text = load_tokenizer(toys / "base"), tmp_path / "text"
    shutil.copytree(corpus, text)
    made = index_folder(text, tokenizer, tmp_path / "cache", "code")
    written = (made / "ngram.json").stat().st_mtime_ns
    assert index_folder(text, tokenizer, tmp_path / "cache", "code") == made
    assert (made / "ngram.json").stat().st_mtime_ns == written
    memory = NgramMemory.open(made)
    assert (memory.name, memory.order, memory.lambda_, memory.tuned, memory.sources) == ("code", 8, 0.5, False, True)
    assert [round(0.5 * weight, 3) for weight in memory.weights] == LAMBDAS
    assert len(list(rows_of(memory))) == 40
    (made / "shard-0" / "suffixes.bin").write_bytes(b"\0" * 8)
    assert open_or_index(text, tokenizer, tmp_path / "cache", "code").revision == memory.revision
    (text / "train" / "more.txt").write_text("More text.")
    assert index_folder(text, tokenizer, tmp_path / "cache", "code") != made
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")]


def test_a_few_words_are_enough(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text that is shorter than the order; one line says so."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    memory = open_or_index(tmp_path / "text", load_tokenizer(toys / "base"), tmp_path / "cache", "tiny")
    ((_, row),) = rows_of(memory)
    assert memory.continuations(row).token_ids.tolist() == [memory.end]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memdec: warning: ")]
    assert len(told) == 1 and "has 2 tokens of text, fewer than the order, 8" in told[0]


def test_a_document_ends_as_it_does_in_training(toys: Path, tmp_path: Path) -> None:
    """With <|endoftext|>, also where a chat model's own end token is that of a turn; no context reaches across a document's end."""
    tokenizer = load_tokenizer(toys / "base")
    tokenizer.eos_token = "<|assistant|>"
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text(name)
    memory = open_or_index(tmp_path / "text", tokenizer, tmp_path / "cache", "tiny")
    assert memory.end == tokenizer.get_vocab()["<|endoftext|>"] == end_of_document(tokenizer)
    row = memory.shards[0].ids.tolist()
    assert memory.continuations(row[:2]).matched == memory.continuations(row).matched == 0


@pytest.mark.parametrize("content", [None, {}, {"a.pdf": b"x"}, {"a.txt": b""}, {"a.txt": b" \n"}, {"a.txt": b"\xff\xfe"}])
def test_folders_without_text_are_named(content: dict[str, bytes] | None, toys: Path, tmp_path: Path) -> None:
    """Missing, empty, of other files, of white space, or not UTF-8; nothing is left in the cache."""
    if content is not None:
        (tmp_path / "text").mkdir()
        for name, data in content.items():
            (tmp_path / "text" / name).write_bytes(data)
    with pytest.raises(CorpusError, match="text") as raised:
        index_folder(tmp_path / "text", load_tokenizer(toys / "base"), tmp_path / "cache", "none")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_a_full_disk_leaves_nothing(corpus: Path, toys: Path, tmp_path: Path) -> None:
    """Neither of an index in the cache, nor of a package; the message names the file."""
    tokenizer, (soft, hard) = load_tokenizer(toys / "base"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # writing beyond it fails as on a full disk
    try:
        with pytest.raises(ManifestError, match="nothing was kept"):
            index_folder(corpus, tokenizer, tmp_path / "cache", "code")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "cache").iterdir())


SMALL = Vocabulary(40, "0123abcd", 0)


def damage_file(folder: Path) -> None:
    """One byte of a text is another."""
    path = folder / "shard-0" / "tokens.bin"
    path.write_bytes(b"\1" + path.read_bytes()[1:])


def cut_file(folder: Path) -> None:
    """An index that was copied half."""
    path = folder / "shard-0" / "suffixes.bin"
    path.write_bytes(path.read_bytes()[:-4])


def change_record(**fields: object) -> object:
    """Other values in the record."""

    def change(folder: Path) -> None:
        record = json.loads((folder / "ngram.json").read_text())
        (folder / "ngram.json").write_text(json.dumps(record | fields))

    return change


@pytest.mark.parametrize(
    ("harm", "wanted"),
    [
        (damage_file, "its bytes are not those"),
        (cut_file, "truncated or damaged"),
        (lambda folder: (folder / "shard-0" / "first.bin").unlink(), "missing"),
        (lambda folder: (folder / "ngram.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "ngram.json").unlink(), "memdec ngram"),
        (shutil.rmtree, "no such folder"),
        (change_record(format=2), "format is 2"),
        (change_record(order=99), "order is 99"),
        (change_record(discounts=[0.5]), "discounts is"),
        (change_record(**{"lambda": 2}), "lambda is 2"),
        (change_record(files={}), "files has no shard-0"),
        (change_record(vocabulary=10), "fit each other"),
        (change_record(tokens=7), "tokens is 7"),
        (change_record(shards=2), "files has no shard-1"),
    ],
)  # fmt: skip
def test_damaged_packages_are_refused(harm: object, wanted: str, tmp_path: Path) -> None:
    """One line that names the file and what is wrong."""
    folder = tmp_path / "m"
    make_memory(folder, {"a": [1, 2, 3, 4], "b": [20, 21]}, SMALL)
    assert callable(harm)
    harm(folder)
    with pytest.raises(PackageError, match=wanted) as raised:
        NgramMemory.open(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    """When a package is written, and when one is read that says so."""
    with pytest.raises(CorpusError, match="token 40"):
        make_memory(tmp_path / "m", {"a": [1, 40]}, SMALL)


def test_an_index_that_is_deleted_goes_on_being_read(tmp_path: Path) -> None:
    """The files stay until the memory is closed, as every open file does."""
    memory = make_memory(tmp_path / "m", {"a": [1, 2, 3, 4, 1, 2, 3]}, SMALL, sources=True)
    before = memory.continuations([1, 2])
    documents = memory.occurrences([1, 2])
    shutil.rmtree(tmp_path / "m")
    assert memory.continuations([1, 2]).token_ids.tolist() == before.token_ids.tolist() == [3]
    assert memory.draft([1, 2], 2) == [3, 0]
    assert memory.occurrences([1, 2]) == documents


def test_a_package_of_another_tokenizer_is_refused(toys: Path, tmp_path: Path) -> None:
    """By the hash of its token -> id map."""
    make_memory(tmp_path / "m", {"a": [1, 2]}, SMALL)
    with pytest.raises(PackageError, match="another tokenizer"):
        open_or_index(tmp_path / "m", load_tokenizer(toys / "base"), tmp_path / "cache", "m")


def test_all_errors_are_of_one_tree() -> None:
    """What the command prints as one line."""
    assert all(issubclass(kind, DecoderError) for kind in (CorpusError, ManifestError, PackageError))


def test_the_guides_commands_parse() -> None:
    """Those of docs/ngram.md."""
    guide = (Path(__file__).parents[2] / "docs" / "ngram.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", guide, re.S) for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line)[1:]
        _parser(words[0]).parse_args(words)
