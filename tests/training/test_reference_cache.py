"""The cache gives back what was computed, and refuses everything else with the reason."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file

from training import distributed, reference_cache
from training.model import load_model, weights_hash
from training.progress import nothing
from training.reference_cache import StaleReferenceError, compute_reference, found_or_computed, load_reference
from training.scoring import score
from training.templates import Format
from training.tokenizer import train_tokenizer


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


def test_another_template_is_refused(cache, corpus, model):
    with pytest.raises(StaleReferenceError, match=r"another template: found plain \w+, expected phi \w+"):
        load_reference(cache, model, Format(corpus.tokenizer, "phi"), corpus.forget)


def test_what_is_in_no_weight_is_compared_too(cache, corpus, model):
    model.config.rope_parameters = model.config.rope_parameters | {"rope_theta": 5e5}
    with pytest.raises(StaleReferenceError, match="another configuration"):
        load_reference(cache, model, corpus.format, corpus.forget)


def test_another_version_or_layout_is_refused(cache, corpus, model, monkeypatch):
    with pytest.raises(StaleReferenceError, match="another batches: found padded, expected packed"):
        load_reference(cache, model, corpus.format, corpus.forget, packing=True)
    ours = reference_cache.versions()
    monkeypatch.setattr(reference_cache, "versions", lambda: ours | {"torch": "9.9"})
    with pytest.raises(StaleReferenceError, match=r"another versions: .* expected npo_kernels .* torch 9\.9"):
        load_reference(cache, model, corpus.format, corpus.forget)


def test_a_copy_of_the_model_has_the_same_header(cache, corpus, model, tmp_path):
    """What is written and loaded again is the same model, and its cache is found."""
    model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model", model.device)
    assert torch.equal(load_reference(cache, again, corpus.format, corpus.forget).logps, model_scores(model, corpus))


def model_scores(model, corpus):
    return score(model, corpus.forget, corpus.format.pad_token_id).logps


@pytest.mark.parametrize("per_token", [None, "token_logps", "hidden"])
def test_changed_numbers_are_refused(tmp_path, corpus, model, per_token):
    """One bit of them, which the header still describes."""
    path = tmp_path / "cache"
    compute_reference(path, model, corpus.format, corpus.forget, per_token=per_token)
    names = ["logps", "num_tokens", *([per_token] if per_token else [])]
    for name in names:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {n: file.get_tensor(n) for n in names}
        whole = tensors[name].clone()
        tensors[name].view(torch.int32).flatten()[4] ^= 1
        save_file(tensors, path, metadata)
        with pytest.raises(StaleReferenceError, match="other numbers than were written"):
            load_reference(path, model, corpus.format, corpus.forget, per_token=per_token)
        save_file(tensors | {name: whole}, path, metadata)
    load_reference(path, model, corpus.format, corpus.forget, per_token=per_token)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_tokens_are_cached_in_the_order_of_rows_and_positions(packing, tmp_path, corpus, model):
    """Whatever batches they were scored in: log-probabilities that add up, hidden states that give them again."""
    found = {}
    for kind in ("token_logps", "hidden"):
        compute_reference(
            tmp_path / kind, model, corpus.format, corpus.forget, batch_size=3, packing=packing, per_token=kind
        )
        found[kind] = load_reference(
            tmp_path / kind, model, corpus.format, corpus.forget, packing=packing, per_token=kind
        )
    counts = found["hidden"].num_tokens
    row = torch.arange(len(counts)).repeat_interleave(counts)
    sums = torch.zeros(len(counts)).index_add(0, row, found["token_logps"].token_logps)
    torch.testing.assert_close(sums, found["token_logps"].logps, rtol=1e-5, atol=1e-4)
    labels = torch.tensor([label for e in corpus.forget for label in e.labels[1:] if label != -100])
    logits = found["hidden"].hidden @ model.lm_head.weight.detach().T
    token = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(token, found["token_logps"].token_logps, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        StaleReferenceError, match="not a readable safetensors file with logps and num_tokens and hidden"
    ):
        load_reference(
            tmp_path / "token_logps", model, corpus.format, corpus.forget, packing=packing, per_token="hidden"
        )


def test_a_diverged_reference_is_refused(tmp_path, corpus, model):
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    compute_reference(tmp_path / "cache", model, corpus.format, corpus.forget)
    with pytest.raises(StaleReferenceError, match="not finite"):
        load_reference(tmp_path / "cache", model, corpus.format, corpus.forget)


def test_adapters_belong_to_the_model(tmp_path, corpus, model):
    """Their weights, their scale, and whether they are in use; the base as well."""
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False))
    path = tmp_path / "cache"
    compute_reference(path, adapted, corpus.format, corpus.forget)

    def refused(name):
        with pytest.raises(StaleReferenceError, match=f"another {name}"):
            load_reference(path, adapted, corpus.format, corpus.forget)

    assert load_reference(path, adapted, corpus.format, corpus.forget).logps.isfinite().all()
    with adapted.disable_adapter():
        refused("configuration")
    adapted.peft_config["default"].lora_alpha = 8
    refused("configuration")
    adapted.peft_config["default"].lora_alpha = 4
    for part in ("lora_B", "base_layer"):
        weight = next(p for name, p in adapted.named_parameters() if part in name)
        with torch.no_grad():
            weight[0, 0] += 1e-3
            refused("model")
            weight[0, 0] -= 1e-3


def test_weights_are_hashed_in_pieces(model, monkeypatch):
    whole = weights_hash(model)
    monkeypatch.setattr("training.model.HASHED_AT_ONCE", 100)
    assert weights_hash(model) == whole
    model.register_buffer("scalar", torch.tensor(1.0))
    assert weights_hash(model) != whole
    model.lm_head.weight.data = model.lm_head.weight.data.t().contiguous().t()  # the same numbers in another order
    assert weights_hash(model) == (monkeypatch.undo() or weights_hash(model))


def test_of_several_processes_one_writes(tmp_path, corpus, model, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    scores = compute_reference(tmp_path / "cache", model, corpus.format, corpus.forget)
    assert torch.equal(scores.logps, model_scores(model, corpus)) and not list(tmp_path.iterdir())


def test_a_truncated_file_is_refused(cache, corpus, model):
    whole = cache.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        cache.write_bytes(whole[:size])
        with pytest.raises(StaleReferenceError, match="not a readable safetensors file"):
            load_reference(cache, model, corpus.format, corpus.forget)


@pytest.mark.parametrize("per_token", [None, "hidden"])
def test_no_changed_bit_is_read(per_token, tmp_path, corpus, model, tried):
    """One at random places of the file, its header above all: refused, or the numbers are those that were written."""
    path, examples, draw = tmp_path / "cache", corpus.forget[:2], random.Random(0)
    compute_reference(path, model, corpus.format, examples, per_token=per_token)

    def read():
        return load_reference(path, model, corpus.format, examples, per_token=per_token)

    whole, scores = path.read_bytes(), read()
    header = 8 + int.from_bytes(whole[:8], "little")
    tensors = whole.index(b'"logps"')  # names, dtypes, shapes and places of the numbers
    places = [*range(8), *range(tensors, header), *(draw.randrange(header, len(whole)) for _ in range(20))]
    refused = 0
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        try:
            found = read()
        except StaleReferenceError:
            refused += 1
        else:
            for ours, theirs in zip(scores, found, strict=True):
                assert ours is theirs is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))
    assert refused > 0.9 * len(places)
    tried("changed bits of reference caches", len(places))


def test_numbers_of_another_type_are_refused(tmp_path, corpus, model):
    """The same bytes under another dtype or shape, as a changed header would have it."""
    path = tmp_path / "cache"
    compute_reference(path, model, corpus.format, corpus.forget, per_token="hidden")
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in ("logps", "num_tokens", "hidden")}
    hidden = tensors["hidden"]
    for other in (hidden.view(torch.int32), hidden.reshape(len(hidden), 2, -1)):
        save_file(tensors | {"hidden": other}, path, metadata)
        with pytest.raises(StaleReferenceError, match="other numbers than were written"):
            load_reference(path, model, corpus.format, corpus.forget, per_token="hidden")


def test_what_is_found_is_taken_and_the_rest_computed(tmp_path, corpus, model, reference):
    """Absent and damaged files are made; that of another model is, but not where the folder is somebody's as well."""
    path, said = tmp_path / "cache" / "forget", []

    def of(model, shared=False):
        return found_or_computed(
            path, model, corpus.format, corpus.forget, shared=shared, counted=lambda *_: nothing, say=said.append
        )

    wanted = model_scores(model, corpus)
    assert torch.equal(of(model, shared=True).logps, wanted) and not said
    stamp = path.stat().st_mtime_ns
    assert torch.equal(of(model).logps, wanted) and path.stat().st_mtime_ns == stamp
    path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(of(model, shared=True).logps, wanted) and "computing the reference" in said.pop()
    kept = path.read_bytes()
    with pytest.raises(StaleReferenceError, match=r"--reference_cache .*cache: forget was computed with another model"):
        of(reference, shared=True)
    assert path.read_bytes() == kept
    assert torch.equal(of(reference).logps, model_scores(reference, corpus))
    assert len(said) == 1 and [p.name for p in path.parent.iterdir()] == ["forget"]


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


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from safetensors.torch import save
from training import reference_cache as cache
from training.benchmarks.tofu.authors import generate_authors
from training.tokenizer import train_tokenizer
from training.model import build_model
from training.templates import Format

rows = generate_authors(1, seed=0)
tokenizer = train_tokenizer(rows, 400)
format = Format(tokenizer)
examples = format.encode(rows)
models = [build_model(len(tokenizer), 64, 1, {}, seed) for seed in (0, 1)]
path, random = Path(sys.argv[1]) / "cache", random.Random(0)


def slowly(tensors, file, metadata):
    content = save(tensors, metadata)
    with open(file, "wb", buffering=0) as opened:
        for start in range(0, len(content), 50):
            opened.write(content[start : start + 50])
            time.sleep(0.002)


def state():
    found = []
    for model in models:
        try:
            found.append(cache.load_reference(path, model, format, examples).logps.isfinite().all().item())
        except cache.StaleReferenceError as reason:
            found.append("absent" if "there is no" in str(reason) else "another model" in str(reason) and "other")
    return found


cache.save_file = slowly
for attempt in range(12):
    child = os.fork()
    if child == 0:
        while True:
            for model in models:
                cache.compute_reference(path, model, format, examples)
    time.sleep(random.uniform(0, 0.15) * (1 + attempt / 2))  # on a busy machine a file takes longer
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(sorted(p.name for p in path.parent.iterdir()), state(), sep="; ")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_while_writing_it_is_the_old_one_or_none(tmp_path):
    """A process that does nothing but write, at a dozen random moments: its file is of one model or of the other."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    moments = [tuple(line.split("; ")) for line in done.stdout.splitlines()]
    states = [state for _, state in moments]
    absent, whole = "['absent', 'absent']", {"[True, 'other']", "['other', True]"}
    assert len(states) == 12 and set(states) <= {absent, *whole}
    assert whole & set(states) and absent not in states[states.index(next(s for s in states if s in whole)) :]
    assert any(".cache." in files for files, _ in moments)  # some were killed in the middle of it
