"""The memory that --dry_run predicts is the memory that a step uses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from training.memory import GIB, estimate

CPU = torch.device("cpu")
LAYERS = 3
ROWS = tuple(range(49, 65))
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
DEFAULTS = {
    "trained": "all",
    "bf16": False,
    "packing": False,
    "attn_implementation": "sdpa",
    "gradient_checkpointing": False,
    "with_reference": False,
    "device": CPU,
}
# One process: what it holds before a model is there, and the most it has held after two steps of each kind. GiB.
STEPS = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from npo_kernels import fused_logprob_loss
from npo_kernels.hf import add_fused_unlearning_head
from training.memory import return_freed_memory

def held(most=True):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM" if most else "VmRSS"].split()[0]) / 2**20

def loss(hidden, weight, labels, **options):
    return fused_logprob_loss(hidden, weight, labels, lambda logps, counts: -logps.mean(), **options)

folder, lengths = sys.argv[1], json.loads(sys.argv[2])
numbers = [held(most=False)]
return_freed_memory()
model = add_fused_unlearning_head(AutoModelForCausalLM.from_pretrained(folder)).train()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
ids = torch.ones(len(lengths), max(lengths), dtype=torch.int64)
mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
labels = ids.where(mask == 1, -100)
for checkpointing, steps in ((True, 2), (False, 1)):  # what takes less comes first, and the moments with it
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    for _ in range(steps):
        model(input_ids=ids, attention_mask=mask, labels=labels, fused_unlearning=loss).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    numbers.append(held())
print(json.dumps(numbers))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    LlamaConfig(**SIZES).save_pretrained(path)
    return path


def of(folder, rows=ROWS, **options):
    return estimate(folder, rows, **(DEFAULTS | options))


def saved_by_a_forward(config, rows, packing, bf16):
    """Bytes of the storages that autograd saves, without parameters; GiB."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation).train()
    if packing:
        ids = torch.ones(1, sum(rows), dtype=torch.int64)
        inputs = {"position_ids": torch.cat([torch.arange(n) for n in rows]).unsqueeze(0)}
    else:
        ids = torch.ones(len(rows), max(rows), dtype=torch.int64)
        inputs = {"attention_mask": (torch.arange(max(rows)) < torch.tensor(rows)[:, None]).long()}
    saved, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        out = model.model(input_ids=ids, use_cache=False, **inputs)
    assert out.last_hidden_state.requires_grad
    return sum(size for place, size in saved.items() if place not in own) / GIB


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("rows", [ROWS, (64,) * 16], ids=["lengths", "one length"])
def test_activations_are_what_a_forward_saves(attention, packing, rows, folder):
    config = LlamaConfig(**SIZES, attn_implementation=attention)
    got = of(folder, rows, packing=packing, attn_implementation=attention)["activations"]
    assert got == pytest.approx(saved_by_a_forward(config, rows, packing, False), rel=0.03)


def test_activations_under_autocast_too(folder):
    config = LlamaConfig(**SIZES, attn_implementation="sdpa")
    got = of(folder, bf16=True)["activations"]
    assert got == pytest.approx(saved_by_a_forward(config, ROWS, False, True), rel=0.06)
    assert got < 0.8 * of(folder)["activations"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what a process holds")
def test_the_total_is_what_a_process_takes(folder, tmp_path):
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    rows = ROWS * 2
    command = [sys.executable, "-c", STEPS, str(tmp_path), json.dumps(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, *most = json.loads(done.stdout.splitlines()[-1])
    for checkpointing, taken in zip((True, False), most, strict=True):
        got = of(folder, rows, gradient_checkpointing=checkpointing)
        ratio = (got["total"] - got["python"]) / (taken - before)
        assert 0.67 < ratio < 1.1, f"checkpointing {checkpointing}: {ratio}"


def test_each_part_answers_to_its_option(folder):
    whole = of(folder)
    assert whole["gradients"] == whole["weights"] and whole["optimizer"] == pytest.approx(
        2 * whole["weights"], abs=2e-3
    )
    assert of(folder, ROWS * 2)["activations"] == pytest.approx(2 * whole["activations"], rel=0.05)
    checkpointed = of(folder, gradient_checkpointing=True)
    assert checkpointed["activations"] < whole["activations"] / 5 and checkpointed["total"] < whole["total"]
    adapted = of(folder, trained=4)
    assert adapted["gradients"] < whole["gradients"] / 10 and adapted["optimizer"] < whole["optimizer"] / 10
    assert adapted["weights"] >= whole["weights"] and 0 < adapted["activations"] < 1.3 * whole["activations"]
    assert of(folder, with_reference=True)["reference"] == whole["weights"] and whole["reference"] == 0
    own = [
        some["total"] - some["python"] for some in (of(folder, accumulated=True), whole)
    ]  # a process grows by itself
    assert own[0] - own[1] == pytest.approx(whole["gradients"], abs=0.3 * whole["gradients"])
    head = of(folder, with_head_copy=True)["reference"]
    assert 0 < head < whole["weights"]
    assert whole["python"] > 0 and of(folder, device=torch.device("cuda"))["python"] == 0


def test_packed_rows_keep_a_mask_a_layer_in_sdpa_and_none_in_flash_attention(folder):
    tokens = 3000
    of_attention = {
        name: of(folder, (100,) * (tokens // 100), packing=True, attn_implementation=name)["activations"]
        for name in ("sdpa", "flash_attention_2")
    }
    masks = LAYERS * 4 * tokens**2 / GIB  # float32, made anew from the one of booleans
    assert of_attention["sdpa"] - of_attention["flash_attention_2"] == pytest.approx(masks, rel=0.25)


@pytest.mark.parametrize("wrong", [{"rows": ()}, {"rows": (3, 0)}, {"trained": 0}])
def test_what_is_no_batch_is_refused(wrong, folder):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        of(folder, **wrong)
