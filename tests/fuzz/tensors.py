"""The tensors of a call: values from its seed, in the layouts it names, and NaN where nothing may be read."""

from itertools import pairwise

import torch
from torch import Tensor

from tests.fuzz.calls import Call


def make(call: Call) -> dict[str, Tensor]:
    """By name: hidden, weight, bias, labels and what the function takes besides; and `counted`, the flat positions that
    are scored, for the oracle."""
    g = torch.Generator().manual_seed(call.seed)
    made = _values(call, g)
    made["labels"], made["mask"] = _labels(call, g)
    if call.function == "kl":
        counted = made["mask"].reshape(-1).nonzero().squeeze(1)
    else:
        counted = torch.tensor([t for t, *_ in scored(call, made["labels"])], dtype=torch.int64)
        del made["mask"]
        if call.packed:
            made["cu_seqlens"] = torch.tensor(call.edges, dtype=torch.int64 if call.seed % 2 else torch.int32)
    _lift_labels(call, made, g)
    if call.garbage:
        unread = torch.ones(made["labels"].numel(), dtype=torch.bool).index_fill(0, counted, False)
        for name in ("hidden", "ref_hidden"):
            if name in made:
                made[name] = made[name].masked_fill(unread.view(call.shape)[..., None], torch.nan)
    if call.function in ("npo", "simnpo"):
        made |= _per_sequence(call, made["labels"], g)
    made = {name: _laid_out(t, _layout(call, name)) for name, t in made.items()}
    return made | {"counted": counted}


def scored(call: Call, labels: Tensor) -> list[tuple[int, int, int]]:
    """(flat position, label, sequence) of the scored positions, in order."""
    flat, ahead = labels.reshape(-1).tolist(), int(call.shift)
    found = []
    for s, (begin, end) in enumerate(pairwise(call.edges)):
        found += [(t, flat[t + ahead], s) for t in range(begin, end - ahead) if flat[t + ahead] != call.ignore_index]
    return found


def _values(call: Call, g: torch.Generator) -> dict[str, Tensor]:
    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).clamp(-3, 3) * scale

    made = {"hidden": normal(*call.shape, call.H), "weight": normal(call.V, call.H, scale=call.spread / call.H**0.5)}
    if call.bias:
        made["bias"] = normal(call.V, scale=0.5)
    if call.function == "kl":
        made["ref_hidden"] = normal(*call.shape, call.H_ref)
        made["ref_weight"] = normal(call.V, call.H_ref, scale=call.spread / call.H_ref**0.5)
        if call.ref_bias:
            made["ref_bias"] = normal(call.V, scale=0.5)
    dtype = getattr(torch, call.dtype)
    return {name: _first_repeated(t.to(dtype), _layout(call, name)) for name, t in made.items()}


def _labels(call: Call, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels with ignored ones, and the mask that KL takes."""
    labels = torch.randint(0, call.V, call.shape, generator=g)
    if call.labels == "one":
        labels.fill_(int(torch.randint(0, call.V, (), generator=g)))
    elif call.labels == "ends":
        labels = labels % 2 * (call.V - 1)
    kept = torch.rand(call.shape, generator=g) >= call.ignored
    if not call.packed:  # what is beyond a sequence is padding
        kept &= torch.arange(call.shape[1]) < torch.tensor(call.lengths, dtype=torch.int64)[:, None]
    if call.function != "kl":
        return _first_repeated(labels.masked_fill(~kept, call.ignore_index), call.others_as), kept
    mask = kept if call.masked else torch.ones_like(kept)
    mask = _first_repeated(mask, call.others_as)
    return _first_repeated(labels.masked_fill(~mask, -100), call.others_as), mask


def _lift_labels(call: Call, made: dict[str, Tensor], g: torch.Generator) -> None:
    """The hidden states of a third of the scored positions point to their label, or away from it, by so many nats."""
    if call.certain == 0 or call.function == "kl" or _layout(call, "hidden") == "expanded":
        return
    rows, weight = made["hidden"].view(-1, call.H), made["weight"].double()
    for t, label, _ in scored(call, made["labels"]):
        row = weight[label]
        if 0 <= label < call.V and row.norm() > 0 and torch.rand((), generator=g) < 0.34:
            rows[t] = (row * (call.certain / row.square().sum())).clamp(-6e4, 6e4).to(rows.dtype)


def _per_sequence(call: Call, labels: Tensor, g: torch.Generator) -> dict[str, Tensor]:
    """Weights, a normalizer and reference log-probabilities; NaN and infinity where they do not count."""
    B = len(call.lengths)
    counts = torch.bincount(torch.tensor([s for *_, s in scored(call, labels)], dtype=torch.int64), minlength=B)
    noise = torch.randn(B, generator=g, dtype=torch.float64)
    made, factors = {}, torch.ones(B)
    if call.weights == "zeros":
        factors = torch.zeros(B)
    elif call.weights is not None:
        factors = torch.randint(0, 4, (B,), generator=g).to(getattr(torch, call.weights))
        factors = factors / 2 if factors.is_floating_point() else factors
    if call.weights is not None:
        made["weights"] = factors
        if call.garbage and factors.is_floating_point():
            made["weights"] = torch.where(counts == 0, torch.nan, factors)
    if isinstance(call.normalizer, str):
        made["normalizer"] = torch.tensor(7, dtype=getattr(torch, call.normalizer))
    if call.function == "npo":
        guess = -counts * torch.tensor(float(call.V)).log()
        ref = {"far": guess + 10 * noise, "near": guess + noise / 10, "beyond": guess - 1000 * noise}[call.ref]
        if call.garbage:
            ref = torch.where((counts > 0) & (factors > 0), ref, torch.inf * noise)
        made["ref_logps"] = ref.to(getattr(torch, call.ref_dtype))
    return {
        name: t if t.dim() == 0 else _first_repeated(t, call.others_as) if not call.garbage else t
        for name, t in made.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


def _layout(call: Call, name: str) -> str:
    if name in ("normalizer", "cu_seqlens"):
        return "contiguous"
    return {"hidden": call.hidden_as, "weight": call.weight_as}.get(name, call.others_as)


def _first_repeated(t: Tensor, how: str) -> Tensor:
    """The values of an expanded tensor."""
    return t[:1].expand(t.shape).clone() if how == "expanded" and t.shape[0] else t


def _laid_out(t: Tensor, how: str) -> Tensor:
    """The same values in other places of a storage."""
    if how == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "every other":
        return t.repeat_interleave(2, -1)[..., 1::2]
    if how == "of wider rows":
        return torch.cat((t, t, t), -1)[..., t.shape[-1] : 2 * t.shape[-1]]
    if how == "behind an offset":
        return torch.cat((t.new_zeros(3), t.reshape(-1)))[3:].view(t.shape)
    if how == "expanded" and t.shape[0] and torch.equal(t, t[:1].expand(t.shape)):
        return t[:1].expand(t.shape)
    if how == "negated" and t.dtype in (torch.float32, torch.float64):  # a view that is negated when it is read
        return torch.complex(torch.zeros_like(t), -t).conj().imag
    return t
