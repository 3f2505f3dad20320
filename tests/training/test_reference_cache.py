"""The cache gives back what was computed, and refuses everything else with the reason."""

import pytest
import torch

from training import reference_cache
from training.data import train_tokenizer
from training.reference_cache import StaleReferenceError, compute_reference, load_reference
from training.scoring import score
from training.templates import Format


@pytest.fixture
def cache(tmp_path, corpus, model):
    path = tmp_path / "cache.safetensors"
    compute_reference(path, model, corpus.format, corpus.forget)
    return path


def test_round_trip(cache, corpus, model):
    loaded = load_reference(cache, model, corpus.format, corpus.forget)
    computed = score(model, corpus.forget, corpus.tokenizer.pad_token_id)
    assert loaded.logps.dtype == torch.float32
    assert torch.equal(loaded.logps, computed.logps)
    assert torch.equal(loaded.num_tokens, computed.num_tokens)


def test_changed_weights_are_refused(cache, corpus, model):
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    with pytest.raises(StaleReferenceError, match="another model"):
        load_reference(cache, model, corpus.format, corpus.forget)


def test_changed_data_are_refused(cache, corpus, model):
    swapped = [corpus.forget[1], corpus.forget[0], *corpus.forget[2:]]
    for examples in (swapped, corpus.forget[:-1], corpus.retain):
        with pytest.raises(StaleReferenceError, match="another data"):
            load_reference(cache, model, corpus.format, examples)


def test_another_tokenizer_is_refused(cache, corpus, model):
    other = Format(train_tokenizer(corpus.rows, vocab_size=480), "plain")
    with pytest.raises(StaleReferenceError, match="another tokenizer"):
        load_reference(cache, model, other, other.encode(corpus.rows[-20:]))


def test_other_settings_are_refused(cache, corpus, model):
    model.set_attn_implementation("eager")
    with pytest.raises(StaleReferenceError, match="another attention: found sdpa, expected eager"):
        load_reference(cache, model, corpus.format, corpus.forget)


def test_a_truncated_file_is_refused(cache, corpus, model):
    whole = cache.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        cache.write_bytes(whole[:size])
        with pytest.raises(StaleReferenceError, match="not a readable safetensors file"):
            load_reference(cache, model, corpus.format, corpus.forget)


def test_an_absent_file_is_named(tmp_path, corpus, model):
    with pytest.raises(StaleReferenceError, match="no reference cache"):
        load_reference(tmp_path / "none.safetensors", model, corpus.format, corpus.forget)


def test_an_interrupted_write_leaves_the_old_cache(cache, corpus, model, monkeypatch):
    def half_written(tensors, path, metadata):
        path.write_bytes(b"\x08\x00")
        raise KeyboardInterrupt

    before = cache.read_bytes()
    monkeypatch.setattr(reference_cache, "save_file", half_written)
    with pytest.raises(KeyboardInterrupt):
        compute_reference(cache, model, corpus.format, corpus.forget)
    assert cache.read_bytes() == before
    monkeypatch.undo()
    compute_reference(cache, model, corpus.format, corpus.forget)  # the leftover is no obstacle
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
