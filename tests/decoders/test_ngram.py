"""N-gram memories against plain counting: every order, several shards, contexts never seen, frequent contexts, drafts and sources."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ngrams import Reference, make_memory, random_documents

from memdec.decoders.reading import ngram_shard
from memdec.decoders.reading.errors import CorpusError, PackageError
from memdec.decoders.reading.ngram import NgramMemory
from memdec.decoders.reading.ngram_index import Text, Vocabulary, add_shard
from memdec.decoders.reading.suffix_array import DEPTH, sort_suffixes

END, SIZE = 0, 40
TOYS = Vocabulary(SIZE, "0123abcd", END)


def contexts(documents: dict[str, list[int]], count: int = 150) -> list[list[int]]:
    """Pieces of the text, some across documents, and tokens at random."""
    draw = random.Random(7)
    text = [token for row in documents.values() for token in [*row, END]]
    starts = [draw.randrange(len(text)) for _ in range(count)]
    pieces = [text[at : at + draw.randrange(0, 14)] for at in starts]
    return [*pieces, *([draw.randrange(SIZE) for _ in range(draw.randrange(9))] for _ in range(count // 2))]


def difference(memory: NgramMemory, reference: Reference, context: list[int]) -> float:
    """Largest difference of the two distributions after a context; also checks what the memory says of the match."""
    base = np.random.default_rng(len(context)).dirichlet(np.ones(SIZE))
    found = memory.continuations(context)
    whole = found.base_mass * base
    whole[found.token_ids] += found.probabilities
    assert abs(float(found.probabilities.sum(dtype=np.float64)) + found.base_mass - 1) < 1e-6
    assert found.matched == reference.matched(context)
    assert np.all(np.diff(found.token_ids) > 0)
    if found.matched:
        assert found.count == sum(reference.after[tuple(context[-found.matched :])].values())
    else:
        assert found.base_mass == 1.0 and not len(found.token_ids) and not found.count
    return float(np.abs(whole - reference.distribution(context, base.tolist())).max())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("order", "shortest"), [(2, 1), (4, 2), (6, 1), (7, 3), (8, 1)])
@pytest.mark.parametrize("frequent", [4096, 8])
def test_equals_plain_counting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: int, shortest: int, shards: int, frequent: int
) -> None:
    """For every order, over one shard and several, with and without contexts whose continuations are stored."""
    monkeypatch.setattr(ngram_shard, "FREQUENT", frequent)
    documents = random_documents(order, 40, 50, SIZE)
    weights = [0.2, 0.5, 0.0, 1.0, 0.9, 1.0, 0.3] if order == 7 else [1.0] * 7
    memory = make_memory(tmp_path / "m", documents, TOYS, shards, order=order, shortest=shortest, weights=weights)
    reference = Reference(list(documents.values()), END, order, shortest, weights)
    assert memory.discounts == pytest.approx(reference.discounts, abs=1e-12)
    assert max(difference(memory, reference, context) for context in contexts(documents)) < 1e-6
    assert (len(memory.shards[0].keys) > 0) == (frequent == 8)


def test_whatever_is_outside_the_vocabulary_ends_a_context(tmp_path: Path) -> None:
    """Padding ids of the base, and ids that two bytes can't hold, are met by a request; they match nothing, and are no error."""
    memory = make_memory(tmp_path / "m", {"a": [1, 2, 3, 1, 2, 4]}, TOYS)
    whole = memory.continuations([5, 6, 1, 2])
    for foreign in (SIZE, 1 << 20, -1):
        assert memory.continuations([1, 2, foreign]).base_mass == 1.0
        assert memory.continuations([foreign, 1, 2]).matched == whole.matched == 2
    assert memory.continuations([]).matched == 0


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    """Above 65,536 ids."""
    large = Vocabulary(1 << 17, "0123abcd", END)
    memory = make_memory(tmp_path / "m", {"a": [70_000, 2, 100_000, 70_000, 2, 5]}, large)
    assert memory.continuations([70_000, 2]).token_ids.tolist() == [5, 100_000]
    assert memory.continuations([4464, 2]).matched == 1  # 70,000 in two bytes


def in_order(text: list[int]) -> list[int]:
    """The order that `sort_suffixes` states, by Python's own sorting."""
    return sorted(range(len(text)), key=lambda at: (text[at : at + DEPTH], at))


SHORT = st.lists(st.sampled_from([0, 1, 2, 300, 65_535]), max_size=5)
REPEATED = st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 40), SHORT).map(lambda x: x[0] * x[1] + x[2])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.one_of(SHORT, REPEATED), st.sampled_from(["u2", ">u2", "u4", ">u4", "i8"]))
@example([], "u2")
@example([0] * 33, "u2")
@example([5] * 200, ">u2")
def test_suffixes_of_short_and_of_repeated_texts(text: list[int], kind: str) -> None:
    """From no token on; repetitions longer than DEPTH stay in the order of their positions, whatever number of bits a token takes."""
    assert sort_suffixes(np.array(text, kind)).tolist() == in_order(text)


@pytest.mark.parametrize("vocabulary", [3, 40, 1 << 17])
@pytest.mark.parametrize("lengths", [(1,), (2,), (3,), (4,), (0, 1), (1, 1), (2, 1), (0, 3)])
def test_memories_of_a_few_tokens(tmp_path: Path, lengths: tuple[int, ...], vocabulary: int) -> None:
    """Of 1 to 4 tokens, all equal or not, in one document or two: each context is answered, matched or not."""
    for number, row in enumerate(([1, 1, 1, 1], [1, 2, 1, 2])):
        documents = {f"{i}": row[:length] for i, length in enumerate(lengths)}
        memory = make_memory(tmp_path / f"{number}", documents, Vocabulary(vocabulary, "0123abcd", END), order=8, sources=True)
        reference = Reference(list(documents.values()), END, 8)
        for context in (part for size in range(4) for part in itertools.product((0, 1, 2), repeat=size)):
            assert memory.continuations(context).matched == reference.matched(context)
            assert len(memory.draft(context, 3)) <= 3 and len(memory.occurrences(context)) <= 3


def test_texts_without_end_tokens_are_refused(tmp_path: Path) -> None:
    """Behind such a text's last token there is nothing to read: both when it is written and when a package says another end."""
    (tmp_path / "m").mkdir()
    with pytest.raises(CorpusError, match="doesn't end with token 2"):
        add_shard(tmp_path / "m", 0, Text.of({"a": [1, 3]}, 0), Vocabulary(SIZE, "0123abcd", 2))
    make_memory(tmp_path / "n", {"a": [1, 3]}, TOYS)
    record = json.loads((tmp_path / "n" / "ngram.json").read_text())
    (tmp_path / "n" / "ngram.json").write_text(json.dumps({**record, "end": 2}))
    with pytest.raises(PackageError, match="doesn't end with token 2"):
        NgramMemory.open(tmp_path / "n")


@pytest.mark.parametrize("largest", [1, 5, 300, 65_535, 1 << 20])
def test_suffixes_are_in_the_order_of_their_tokens(largest: int) -> None:
    """By their first DEPTH tokens, then by position, whatever number of bits a token takes."""
    draw = np.random.default_rng(largest)
    ids = np.concatenate([draw.integers(0, largest + 1, 300), np.tile(draw.integers(0, largest + 1, 7), 30), [largest]])
    text = ids.tolist()
    order = sort_suffixes(ids).tolist()
    assert sorted(order) == list(range(len(text)))
    keys = [(text[at : at + DEPTH], at) for at in order]
    assert [key for key, _ in keys] == sorted(key for key, _ in keys)


def test_drafts_follow_the_longest_match(tmp_path: Path) -> None:
    """Beyond the order too; each token is the most frequent among what followed; a document's end ends the draft."""
    sentence = list(range(1, 31))
    memory = make_memory(tmp_path / "m", {"a": sentence, "b": [9, 10, 11, 35, 36], "c": [9, 10, 11, 35, 37, 38]}, TOYS, order=3)
    assert memory.draft(sentence[:20], 6) == sentence[20:26]
    assert memory.draft(sentence[:28], 6) == [29, 30, END]
    assert memory.draft([7, 9, 10, 11], 3) == [35, 36, END]
    assert memory.draft([8, 9, 10, 11], 3) == [12, 13, 14]
    assert memory.draft([39], 3) == memory.draft([], 3) == memory.draft([END], 3) == []


def test_occurrences_name_document_and_offset(tmp_path: Path) -> None:
    """Up to the limit, over shards, and only where the package was built for it."""
    documents = {"x.txt": [5, 6, 7, 8], "y.txt": [1, 6, 7, 9], "z.txt": [2, 2, 2, 6, 7]}
    memory = make_memory(tmp_path / "m", documents, TOYS, shards=2, sources=True)
    assert {(o.document, o.offset) for o in memory.occurrences([6, 7])} == {("x.txt", 1), ("y.txt", 1), ("z.txt", 3)}
    assert [(o.document, o.offset) for o in memory.occurrences([4, 5, 6])] == [("x.txt", 0)]
    assert len(memory.occurrences([6], limit=2)) == 2
    assert memory.occurrences([33]) == []
    without = make_memory(tmp_path / "n", documents, TOYS)
    with pytest.raises(PackageError, match="--with-sources"):
        without.occurrences([6, 7])
