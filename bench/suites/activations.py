"""Real hidden states, head and labels at three moments of an unlearning run: before, in the middle, after.

A small Llama learns fictitious (or, with `--data_dir`, TOFU's) authors and then forgets some of them by
NPO + retain, with the machinery of `training/`. At each moment every provider gets the forget
and retain rows of one batch: time, and error against float64. For the forget rows also:

    gap_max       max over tokens of z_max - z_y, nats: the range of an anchored exponential
    weight_*      2 sigmoid(beta r) of the sequences: smallest, median, largest; 1 is gradient ascent
    skip_share    share of rows that a certificate could skip: a row's share of the gradient of the logits is
                  sum_v |dlogits_iv| = 2 |g_i| (1 - p_y), and it is at most 2^-12 / N of the largest row's
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench.cases import IGNORED, Batch, Case, Head
from bench.measure import described, time_batch
from bench.objectives import BETA
from bench.options import Options
from bench.records import Record, record, summary
from bench.suites.accuracy import errors
from training.benchmarks.authors import load_split
from training.config import TrainConfig
from training.data import Example, collate
from training.methods import METHODS, Settings
from training.model import build_model, special_ids_of
from training.scoring import score
from training.steps import Batches, FinetuningSteps, plan_unlearning
from training.templates import Format
from training.tokenizer import train_tokenizer
from training.trainer import Metrics, Trainer
from training.unlearning import Frozen, UnlearningSteps

MOMENTS = ("before", "middle", "after")
THRESHOLD = 2.0**-12
TOY = {"authors": 4, "vocabulary": 400, "width": 64, "layers": 1, "finetune": 2, "epochs": 2, "batch": 4}
FULL = {"authors": 20, "vocabulary": 4096, "width": 512, "layers": 1, "finetune": 8, "epochs": 10, "batch": 16}
FINETUNE_LR, UNLEARN_LR = 2e-3, 3e-4


def run(options: Options) -> Iterator[Record]:
    for moment, batch in moments(options):
        lengths = tuple((0, int(n)) for n in batch.num_tokens)
        case = Case(moment, Head(batch.hidden.shape[-1], batch.weight.shape[0]), lengths, data="real")
        if options.chosen([case]):
            yield from time_batch(options, case, batch)
            yield from errors(options, case, batch)
            yield from statistics(options, case, batch)


def moments(options: Options) -> Iterator[tuple[str, Batch]]:
    """The batch of forget and retain rows as the model of each moment sees it."""
    s = TOY if options.toy else FULL
    device = torch.device(options.device)
    split = load_split(options.data_dir, s["authors"], 10, seed=0)
    tokenizer = train_tokenizer(split.retain + split.forget, s["vocabulary"])
    pad = tokenizer.pad_token_id
    forget, retain = (Format(tokenizer, "plain").encode(rows) for rows in (split.forget, split.retain))
    model = build_model(len(tokenizer), s["width"], s["layers"], special_ids_of(tokenizer), seed=0)
    model.to(device)  # type: ignore[arg-type]  # mypy loses self in transformers' wraps(Module.to)
    everything = retain + forget
    config, batches = TrainConfig(s["finetune"], FINETUNE_LR, s["batch"]), Batches(pad, device, packing=False)
    learning = FinetuningSteps(everything, config, batches)
    Trainer(model, config, len(learning)).train(learning)
    reference = score(model, forget, pad)

    rows = forget[: s["batch"]] + retain[: s["batch"]]
    reference_logps = torch.cat((reference.logps[: s["batch"]], score(model, retain[: s["batch"]], pad).logps))
    before = snapshot(model, rows, pad, reference_logps, s["batch"], options)
    yield "before", before
    config = replace(config, epochs=s["epochs"], lr=UNLEARN_LR)
    plan = plan_unlearning(len(forget), len(retain), 0, config)
    kinds = {"forget": forget, "retain": retain}
    frozen = Frozen({"forget": reference})
    steps = UnlearningSteps(METHODS["npo_rt"], Settings(BETA), plan, kinds, frozen, config, batches)
    seen, steps_an_epoch = [], len(steps) // config.epochs

    def after_step(metrics: Metrics) -> None:
        if metrics.step in (config.epochs // 2 * steps_an_epoch, len(steps)):
            batch = snapshot(model, rows, pad, reference_logps, s["batch"], options)
            seen.append(replace(batch, ref_hidden=before.hidden.detach()))

    Trainer(model, config, len(steps)).train(steps, after_step=after_step)
    yield from zip(MOMENTS[1:], seen, strict=True)


@torch.no_grad()
def snapshot(model, rows: list[Example], pad: int, ref_logps: Tensor, num_forget: int, options: Options) -> Batch:
    """Hidden states, head and shifted labels of the rows, copied: the model goes on training."""
    was_training = model.training
    model.eval()
    inputs = collate(rows, pad, model.device)
    backbone = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    hidden = backbone.last_hidden_state[:, :-1].to(options.torch_dtype, copy=True).contiguous()
    model.train(was_training)
    weight = model.lm_head.weight.detach().to(options.torch_dtype, copy=True)
    labels = inputs["labels"][:, 1:].contiguous()
    batch = Batch(hidden, weight, labels, hidden, ref_logps.to(model.device), None, num_forget)
    return batch.for_mode("full")


@torch.no_grad()
def statistics(options: Options, case: Case, batch: Batch) -> Iterator[Record]:
    """The quantities listed in the docstring of this module, of the forget rows."""
    n = batch.num_forget
    labels, scored = batch.labels[:n], batch.labels[:n] != IGNORED
    logits = batch.hidden[:n].float() @ batch.weight.float().t()
    label_logit = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    gap = (logits.amax(-1) - label_logit)[scored]
    logps = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    ratio = (logps * scored).sum(1) - batch.ref_logps[:n]
    weight = 2 * torch.sigmoid(BETA * ratio)  # (n,)
    mass = (weight[:, None] * -torch.expm1(logps))[scored]  # |g_i| (1 - p_y), up to a common factor
    skipped = mass <= THRESHOLD / mass.numel() * mass.max()
    values = {
        "gap_max": gap.max(),
        "weight_min": weight.min(),
        "weight_median": weight.median(),
        "weight_max": weight.max(),
        "skip_share": skipped.float().mean(),
    }
    fields = described(options, case, "plain/eager", "full") | {"what": "fwd", "note": "forget rows"}
    for metric, value in values.items():
        yield record(options.device, **fields, metric=metric, **summary([value.item()]))
