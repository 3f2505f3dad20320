"""A call of a public function as a handful of plain values: what hypothesis draws, shrinks and prints.

`Call` has no tensors. They are made of its fields, by `tests.fuzz.tensors`, from a seed; so the text of a failing call
is all that is needed to run it again (`tests/fuzz/kept.py`).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import accumulate, combinations

import torch
from hypothesis import strategies as st

FUNCTIONS = ("npo", "simnpo", "logprob", "token", "sequences", "tokens", "statistics", "kl")
PARTS = ("hidden", "weight", "bias")
STATISTICS = ("logp", "entropy", "max_logit", "mean_logit", "var_logp", "argmax")


@dataclass(frozen=True, repr=False)
class Call:
    """The defaults are the plainest call there is; a repr names what differs from them."""

    function: str = "npo"
    dtype: str = "float32"
    autocast: str | None = None
    lengths: tuple[int, ...] = (3,)  # of the sequences; those of a padded batch are as long as the longest
    packed: bool = False
    H: int = 2
    V: int = 3
    seed: int = 0
    needs: tuple[str, ...] = PARTS
    upstream: float = 0.7  # its factor
    # the head
    bias: bool = False
    logit_scale: float = 1.0
    softcap: float | None = None
    spread: float = 1.0  # standard deviation of the logits
    certain: float = 0.0  # by how much some labels lie above the other logits, or below them
    # what is scored
    shift: bool = True
    ignored: float = 0.0  # part of the labels
    ignore_index: int = -100
    labels: str = "any"  # "any" | "one": all the same | "ends": the first and the last
    garbage: bool = False  # NaN where nothing is read
    # in memory
    hidden_as: str = "contiguous"
    weight_as: str = "contiguous"
    others_as: str = "contiguous"
    # how it is run
    workspace: str | float | None = None  # MiB, or "tiny": the smallest slices, or "least": what the refusal says
    num_rows: str | None = None  # "exact" | "bound"
    # losses
    beta: float = 0.1
    gamma: float = 0.0
    reduction: str = "mean"
    normalizer: float | str | None = None  # a number, or the dtype of a tensor
    weights: str | None = None  # a dtype, or "zeros"
    ref: str = "far"  # "far" | "near" | "beyond"
    ref_dtype: str = "float32"
    # statistics and KL
    which: tuple[str, ...] = STATISTICS
    reverse: bool = False
    target_shift: float = 0.0
    masked: bool = True
    H_ref: int = 2
    ref_bias: bool = False

    def __repr__(self) -> str:
        values = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return f"Call({', '.join(f'{name}={value!r}' for name, value, default in values if value != default)})"

    @property
    def working_dtype(self) -> torch.dtype:
        """Of the products."""
        return getattr(torch, self.autocast or self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the positions."""
        return (sum(self.lengths),) if self.packed else (len(self.lengths), max(self.lengths, default=0))

    @property
    def edges(self) -> list[int]:
        """The first flat position of each sequence, and the end."""
        B = len(self.lengths)
        return list(accumulate(self.lengths if self.packed else [self.shape[1]] * B, initial=0))

    @property
    def wanted(self) -> list[str]:
        """The tensors that require grad."""
        return [name for name in self.needs if name != "bias" or self.bias]


# ---------------------------------------------------------------------------------------------------------------------
# Strategies; the first of each list is what a failure shrinks to
# ---------------------------------------------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "transposed", "every other", "of wider rows", "behind an offset", "expanded", "negated")
_LAYOUTS = (*["contiguous"] * 4, *LAYOUTS[1:])


def _mostly(usual, *others):
    """As often the first as one of the others."""
    return (usual,) * len(others) + others


def _choices(function: str, impl: str) -> dict[str, tuple]:
    """The values of each field but the lengths, equally likely."""
    dtypes = ("float64", "float32") if impl == "reference" else ("float32", "bfloat16", "float16")
    sizes = (2, 1, 7, 16, 33, *range(1, 80, 12))
    drawn = {
        "function": (function,),
        "dtype": dtypes,
        "packed": (False, True),
        "H": sizes,
        "V": (3, 1, 2, 9, 63, 64, 65, 72, 73, 128, 130, 201, *range(1, 260, 9)),
        "seed": tuple(range(1000)),
        "needs": (PARTS, *combinations(PARTS, 2), *combinations(PARTS, 1), ()),
        "upstream": (0.7, 1.0, -3.0, 2.0**-12),
        "bias": (False, True),
        "logit_scale": _mostly(1.0, 0.4, -1.3, 1e-3, 20.0),
        "softcap": _mostly(None, 3.0, 30.0, 0.5, 1e4),
        "spread": _mostly(1.0, 0.1, 3.0, 30.0, 1e4),
        "certain": _mostly(0.0, 10.0, 80.0, -40.0, -200.0, 1e4),
        "shift": _mostly(True, False),
        "ignored": (0.0, 0.3, 0.3, 0.3, 0.9, 1.0),
        "ignore_index": (-100, -1, 0, 2, 2**40),
        "labels": _mostly("any", "one", "ends"),
        "garbage": (False, True),
        "hidden_as": _LAYOUTS,
        "weight_as": _LAYOUTS,
        "others_as": _LAYOUTS,
        "workspace": (None, "tiny", "least", 0.2),
    }
    if impl != "reference":
        drawn["autocast"] = _mostly(None, None, None, "bfloat16", "float16")
    if function != "kl":
        drawn["num_rows"] = _mostly(None, "exact", *(("bound",) if function != "token" else ()))
    if function in ("npo", "simnpo"):
        drawn |= {
            "beta": _mostly(0.1, 1.0, 4.5, 1e-6, 1e3),
            "reduction": ("mean", "mean", "mean", "sum", "none"),  # which alone has a normalizer
            "normalizer": _mostly(None, 7, 2.5, "float32", "int64", "float64"),
            "weights": _mostly(None, "float32", "int64", "bfloat16", "zeros"),
        }
    if function == "npo":
        drawn |= {"ref": ("far", "near", "beyond"), "ref_dtype": _mostly("float32", "float64")}
    if function == "simnpo":
        drawn["gamma"] = _mostly(0.0, 0.5, -4.0, 1e3)
    if function == "statistics":
        drawn["which"] = _mostly(STATISTICS, *combinations(STATISTICS, 2), ())
    if function == "kl":
        drawn |= {
            "reduction": ("mean", "sum", "none"),
            "reverse": (False, True),
            "target_shift": _mostly(0.0, 3.0, -1.0, 1e3),
            "masked": (False, True),
            "H_ref": sizes,
            "ref_bias": (False, True),
        }
    return drawn


def calls(function: str, impl: str, largest: int = 12) -> st.SearchStrategy[Call]:
    """Legal calls of a function, sequences of up to `largest` positions; hypothesis likes small ones, and shrinks."""
    some = st.lists(st.integers(2, largest), min_size=1, max_size=4)
    lengths = some | some | st.lists(st.integers(0, largest), max_size=5)
    drawn = {name: st.sampled_from(values) for name, values in _choices(function, impl).items()}
    return st.builds(Call, lengths=lengths.map(tuple), **drawn).map(_legal)


def random_call(function: str, impl: str, seed: int, largest: int = 12) -> Call:
    """The same, each value as likely as any other."""
    rng = random.Random(seed)
    number, least = rng.choice(((1, 2), (2, 2), (3, 0), (4, 1), (5, 0), (3, 3), (0, 0)))
    drawn = {name: rng.choice(values) for name, values in _choices(function, impl).items()}
    return _legal(Call(lengths=tuple(rng.randint(least, largest) for _ in range(number)), **drawn))


def _legal(call: Call) -> Call:
    """What the contract does not allow together is left out."""
    changes = {}
    if call.autocast is not None:
        changes["dtype"] = "float32"
    if call.reduction != "mean":
        changes["normalizer"] = None
    if call.function == "kl" and not call.masked:
        changes["garbage"] = False
    return replace(call, **changes)


def smaller(call: Call, fails: Callable[[Call], bool]) -> Call:
    """The call with as many defaults as still fail, and as few and short sequences."""
    changed = True
    while changed:
        candidates = [
            replace(call, **{f.name: f.default}) for f in fields(call) if f.name not in ("function", "lengths")
        ]
        for i, length in enumerate(call.lengths):
            rest = call.lengths[:i], call.lengths[i + 1 :]
            candidates += [
                replace(call, lengths=(*rest[0], *new, *rest[1])) for new in ((), (length // 2,), (length - 1,))
            ]
        found = next((c for c in candidates if c != call and min(c.lengths, default=0) >= 0 and fails(c)), None)
        changed, call = found is not None, found or call
    return call
