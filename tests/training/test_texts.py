"""Corpora as examples, and evaluations that resume."""

import json

import pytest

from training.data import IGNORE_INDEX
from training.pieces import Pieces
from training.texts import chunks, continuation, documents

TEXTS = ["The mill was sold in 1931.", "Nobody wrote about it, for years.\nThen they did.", "Short."]


@pytest.mark.parametrize("size", [3, 7, 1000])
def test_chunks_hold_the_corpus_once(corpus, size):
    found = chunks(corpus.format, TEXTS, size)
    bos = corpus.tokenizer.bos_token_id
    assert all(2 <= len(e.input_ids) <= size and e.input_ids[0] == bos for e in found)
    assert all(e.labels == [IGNORE_INDEX, *e.input_ids[1:]] for e in found)
    ids = [i for e in found for i in e.input_ids[1:]]
    assert corpus.format.decode(ids) == "\n\n".join(TEXTS)
    assert {len(e.input_ids) for e in found[:-1]} <= {size}


def test_chunks_too_small_and_of_nothing(corpus):
    with pytest.raises(ValueError, match="max_tokens: expected at least 3, got 2"):
        chunks(corpus.format, TEXTS, 2)
    assert chunks(corpus.format, [], 10) == []


def test_documents_are_cut(corpus):
    found = documents(corpus.format, TEXTS, 6)
    assert [len(e.input_ids) for e in found[:2]] == [6, 6] and len(found) == 3
    assert found[0].input_ids == corpus.format.text_ids(TEXTS[0])[:6]


def test_a_continuation_alone_is_scored(corpus):
    example = continuation(corpus.format, "Question: who?\nAnswer:", " Nobody")
    scored = [label for label in example.labels if label != IGNORE_INDEX]
    assert corpus.format.decode(scored) == " Nobody" and example.input_ids[-len(scored) :] == scored
    assert corpus.format.decode(example.input_ids, skip_special_tokens=True) == "Question: who?\nAnswer: Nobody"


def test_pieces_are_found_again(tmp_path):
    calls = []

    def double(block):
        calls.append(list(block))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [(2 * x, None) for x in block]

    items = list(range(10))
    with pytest.raises(KeyboardInterrupt):
        Pieces("a", tmp_path / "p", "key").rows("double", items, double, size=4)
    pieces = Pieces("a", tmp_path / "p", "key")
    assert pieces.rows("double", items, double, size=4) == [[2 * x, None] for x in items]
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [8, 9]]
    assert pieces.rows("double", items, double, size=4) and len(calls) == 4
    assert Pieces("a", tmp_path / "p", "other").rows("double", items[:4], double, size=4) and len(calls) == 5
    pieces.clear()
    assert not (tmp_path / "p").exists() and Pieces("a").rows("double", items, double, size=9)


def test_a_damaged_piece_is_computed_again(tmp_path):
    pieces = Pieces("a", tmp_path, "key")
    pieces.rows("x", [1, 2], list)
    (path,) = tmp_path.iterdir()
    for text in ("", "{", json.dumps({"key": "key"})[:-1]):
        path.write_text(text)
        assert pieces.rows("x", [1, 2], list) == [1, 2]
    with pytest.raises(ValueError, match="a value for each of 2 items, got 1"):
        pieces.rows("y", [1, 2], lambda block: block[:1])
