"""Error of every provider against float64 on the same rounded inputs; plain PyTorch in the same dtype is one of them.

    random     logits of standard deviation 2
    peaked     memorised: the label has nearly all the probability, the gradient depends on 1 - p
    forgotten  unlearned: the label has almost none

`tensor` names the compared tensor: logps (largest |error| / |value| of a sequence), hidden and weight gradients
(relative in the Frobenius norm). The oracle of a provider is the objective that it computes.
"""

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from bench.cases import TARGET_LOGIT, Batch, Case, Head, even
from bench.measure import described, failure, release
from bench.options import Options
from bench.providers import PROVIDERS, UnsupportedError
from bench.records import Record, record

NAMES = {"hidden": "bwd", "weight": "bwd", "logps": "logprobs"}


def cases(toy: bool) -> list[Case]:
    head, N, B = (Head(48, 1000), 64, 4) if toy else (Head(2048, 32000), 2048, 8)
    return [even(data, head, N, B, data) for data in TARGET_LOGIT]


def run(options: Options) -> Iterator[Record]:
    for case in options.chosen(cases(options.toy)):
        yield from errors(options, case, case.batch(options.torch_dtype, options.device))


def errors(options: Options, case: Case, batch: Batch, **fields) -> Iterator[Record]:
    """rel_err of every provider on one batch."""
    truth: dict[str, dict[str, Tensor]] = {}
    for name in options.provider_names:
        provider = PROVIDERS[name]
        if provider.computes == "product":
            continue
        common = described(options, case, name, "full") | {"metric": "rel_err"} | fields
        if provider.computes not in truth:
            truth[provider.computes] = oracle(batch, provider.computes)
        try:
            found = evaluate(name, batch)
        except Exception as error:  # whatever a peer raises is its result
            why = failure(error)
            yield record(options.device, **common, what="bwd", status=why.status, error=why.error)
            release(batch.hidden.is_cuda)
            continue
        for tensor, value in found.items():
            worst = error_of(tensor, value, truth[provider.computes][tensor])
            statistics = {"value": worst, "p20": worst, "p80": worst, "reps": 1}
            yield record(options.device, **common, what=NAMES[tensor], tensor=tensor, **statistics)


def evaluate(name: str, batch: Batch) -> dict[str, Tensor]:
    """Gradients, and log-probabilities if the provider has them."""
    batch, provider = batch.for_mode("full"), PROVIDERS[name]
    with provider.setting():
        found = dict(zip(("hidden", "weight"), gradients(provider.run(batch), batch), strict=True))
        with suppress(UnsupportedError), torch.no_grad():
            found["logps"] = provider.run(batch.for_mode("logprobs"))
    return found


def oracle(batch: Batch, computes: str) -> dict[str, Tensor]:
    """The same in float64, logits and all."""
    batch = batch.for_mode("full", torch.float64)
    logps = float64_logps(batch)
    found = gradients(batch.objective(computes, logps), batch)
    return {"hidden": found[0], "weight": found[1], "logps": logps.detach()}


def float64_logps(batch: Batch) -> Tensor:
    """(B,) in the dtype of the batch, float64 here."""
    logits = batch.hidden @ batch.weight.t()
    if batch.softcap is not None:
        logits = batch.softcap * torch.tanh(logits / batch.softcap)
    scored = batch.labels >= 0
    picked = torch.log_softmax(logits, -1).gather(-1, batch.labels.clamp(min=0)[..., None]).squeeze(-1)
    return (picked * scored).sum(1)


def gradients(loss: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    return tuple(g.detach() for g in torch.autograd.grad(loss, batch.leaves))


def error_of(tensor: str, value: Tensor, truth: Tensor) -> float:
    difference = value.double() - truth
    if tensor == "logps":
        return (difference.abs() / truth.abs().clamp(min=1e-12)).max().item()
    return (torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(truth)).item()
