"""A whole NPO + retain step of a Llama on TOFU-sized text, random weights: forward, backward, AdamW.

    npo_kernels/*        hidden states, one fused loss for forget and retain rows, cached reference log-probabilities
    plain/live           as in public frameworks: padded batch, logits, float32 log-softmax, and the reference model
                         in memory, run at every step
    plain/cached         the same with cached reference log-probabilities: the effect of caching alone

Metrics: ms; tokens_per_s, of tokens that are not padding; peak_mb of everything, weights, reference model, gradients
and optimiser state included; and, on a GPU, max_batch: the largest number of forget sequences, with as many retain
sequences, whose step fits. Each in a process of its own; those of small models take turns.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.cases import IGNORED, Case, Head
from bench.isolate import take_turns
from bench.measure import Failure
from bench.objectives import npo
from bench.options import Options
from bench.records import Record, record, summary
from bench.suites import tofu
from npo_kernels import fused_logprob_loss
from npo_kernels.call.arguments import Impl
from npo_kernels.env import installed_version

LR = 1e-5


@dataclass(frozen=True)
class Architecture:
    """A Llama configuration."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool


MODELS = {
    "llama-3.2-1b": Architecture(2048, 16, 32, 8, 8192, 128256, tied=True),
    "llama-2-7b": Architecture(4096, 32, 32, 32, 11008, 32000, tied=False),
    "smollm2-135m": Architecture(576, 30, 9, 3, 1536, 49152, tied=True),
    "toy": Architecture(64, 2, 2, 2, 128, 1000, tied=True),
}
ALONE = ("llama-2-7b",)  # two of these with their optimisers do not fit into a GPU
LARGEST = 4096  # forget sequences


@dataclass(frozen=True)
class StepJob:
    """One provider, one model, one batch; a turn is a step."""

    provider: str
    model: str
    lengths: tuple[tuple[int, int], ...]
    dtype: str
    device: str
    threads: int | None
    reps: int
    warmup: int = 1
    whole: bool = True
    limit: float = math.inf
    patience: float = 0.0

    def prepare(self) -> Callable[[], object]:
        state = TrainingState(self)
        inputs = state.batch(self.lengths)
        state.step(inputs)  # creates the optimiser state
        return lambda: state.step(inputs)


@dataclass(frozen=True)
class SearchJob(StepJob):
    """A turn is the search for the largest batch; after `seconds` the largest that fitted so far is returned."""

    seconds: float = math.inf

    def prepare(self) -> Callable[[], object]:
        state = TrainingState(self)
        half = len(self.lengths) // 2
        deadline = time.monotonic() + self.seconds

        def fits(count: int) -> bool:
            if time.monotonic() > deadline:
                return False
            repeated = [self.lengths[i % half] for i in range(count)]
            repeated += [self.lengths[half + i % half] for i in range(count)]
            try:
                state.step(state.batch(tuple(repeated)))
            except torch.OutOfMemoryError:
                return False
            finally:
                torch.cuda.empty_cache()
            return True

        return lambda: largest(fits, LARGEST)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest count up to `limit` that fits, 0 if none: doubling, then bisection."""
    good, bad = 0, limit + 1
    count = 1
    while good < count < bad:
        if fits(count):
            good, count = count, min(2 * count, limit)
        else:
            bad = count
    while bad - good > max(1, good // 32):  # to about 3 %
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


class TrainingState:
    """Model, optimiser, and for `plain/live` the reference model."""

    def __init__(self, job: StepJob):
        self.provider, self.device = job.provider, job.device
        self.dtype, self.arch = getattr(torch, job.dtype), MODELS[job.model]
        self.model = self._build()
        self.reference = self._build().eval().requires_grad_(False) if job.provider == "plain/live" else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=job.device.startswith("cuda"))

    def _build(self):
        a = self.arch
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=a.vocab,
            hidden_size=a.hidden,
            intermediate_size=a.intermediate,
            num_hidden_layers=a.layers,
            num_attention_heads=a.heads,
            num_key_value_heads=a.kv_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=a.tied,
            use_cache=False,
            dtype=self.dtype,
        )
        with torch.device(self.device):
            return LlamaForCausalLM(config).to(self.dtype)

    def batch(self, lengths: tuple[tuple[int, int], ...]) -> dict[str, Tensor]:
        """Random tokens of these lengths, padded on the right; labels aligned with the inputs, prompts ignored."""
        longest = 1 + max(ignored + scored for ignored, scored in lengths)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.arch.vocab, (len(lengths), longest), generator=generator)
        position = torch.arange(longest)
        ignored, scored = torch.tensor(lengths).T.unsqueeze(-1)
        real = position <= ignored + scored
        labels = ids.masked_fill(~real | (position <= ignored), IGNORED)
        made = {"input_ids": ids, "attention_mask": real.long(), "labels": labels}
        made["ref_logps"] = -float(torch.tensor(self.arch.vocab).log()) * scored.squeeze(-1).float()
        return {name: t.to(self.device) for name, t in made.items()}

    def step(self, batch: dict[str, Tensor]) -> None:
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        num_forget = batch["labels"].shape[0] // 2
        if self.provider.startswith("npo_kernels/"):
            hidden = self.model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            return fused_logprob_loss(
                hidden,
                self.model.lm_head.weight,
                batch["labels"],
                lambda logps, num_tokens: npo(logps, num_tokens, batch["ref_logps"], num_forget),
                impl=cast(Impl, self.provider.removeprefix("npo_kernels/")),
            )
        logps, num_tokens = from_logits(self.model, batch)
        ref_logps = batch["ref_logps"]
        if self.reference is not None:
            forget = {name: t[:num_forget] for name, t in batch.items()}
            with torch.no_grad():
                ref_logps, _ = from_logits(self.reference, forget)
        return npo(logps, num_tokens, ref_logps, num_forget)


def from_logits(model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(logps, num_tokens) in plain PyTorch."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    scored = labels != IGNORED
    logps = F.log_softmax(logits, dim=-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (logps * scored).sum(1), scored.sum(1)


def run(options: Options) -> Iterator[Record]:
    models = ("toy",) if options.toy else ("smollm2-135m", "llama-3.2-1b", "llama-2-7b")
    for model in models:
        case, source = case_of(options, model)
        if options.chosen([case]):
            yield from steps(options, model, providers(options))
            for name in providers(options):
                yield largest_batch(options, model, name)


def providers(options: Options) -> list[str]:
    return [f"npo_kernels/{'triton' if options.on_gpu else 'torch'}", "plain/live", "plain/cached"]


def case_of(options: Options, model: str) -> tuple[Case, str]:
    """TOFU's batch at the head of a model, and the source of its lengths."""
    cases, source = tofu.cases(options)
    arch, lengths = MODELS[model], cases[0].lengths
    return Case(f"{model}/step", Head(arch.hidden, arch.vocab), lengths, retain=len(lengths) // 2), source


def steps(options: Options, model: str, names: Sequence[str]) -> Iterator[Record]:
    """Time, tokens per second and peak of every provider."""
    case, source = case_of(options, model)
    fields = (model, case.lengths, options.dtype, options.device, options.threads, options.reps)
    jobs = {StepJob(name, *fields): name for name in names}
    tokens = sum(ignored + scored + 1 for ignored, scored in case.lengths)
    for job, turns in take_turns(jobs, together=model not in ALONE).items():
        common = _fields(options, case, jobs[job], source)
        if isinstance(turns, Failure):
            yield record(options.device, **common, metric="ms", status=turns.status, error=turns.error)
            continue
        milliseconds, peaks, _ = zip(*turns, strict=True)
        yield record(options.device, **common, metric="ms", **summary(milliseconds))
        rates = [1e3 * tokens / ms for ms in milliseconds]
        yield record(options.device, **common, metric="tokens_per_s", **summary(rates))
        yield record(options.device, **common, metric="peak_mb", **summary(peaks))


def largest_batch(options: Options, model: str, name: str) -> Record:
    """Forget sequences of the largest step that fits, with as many retain sequences; found within `options.seconds`."""
    case, source = case_of(options, model)
    fields = _fields(options, case, name, source) | {"metric": "max_batch"}
    if not options.on_gpu:
        return record(options.device, **fields, status="unsupported", error="a CPU has no memory limit of its own")
    job = SearchJob(
        name, model, case.lengths, options.dtype, options.device, options.threads, reps=1, warmup=0,
        seconds=options.seconds,
    )  # fmt: skip
    turns = take_turns([job])[job]
    if isinstance(turns, Failure):
        return record(options.device, **fields, status=turns.status, error=turns.error)
    return record(options.device, **fields, **summary([turn.answer for turn in turns if turn.answer is not None]))


def _fields(options: Options, case: Case, name: str, source: str) -> Record:
    return {
        "suite": options.suite,
        "case": case.name,
        "provider": name,
        "provider_version": installed_version("npo-kernels" if name.startswith("npo") else "torch"),
        "mode": "full",
        "what": "fwd_bwd",
        "dtype": options.dtype,
        **case.shape,
        "exact": True,
        "computes": "npo",
        "threads": options.threads,
        "data": "tofu",
        "note": f"lengths: {source}; AdamW step included",
    }
