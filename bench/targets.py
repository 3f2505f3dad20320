"""The targets of the kernel design and how each is computed from result files. Measuring them needs a GPU."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.cases import R
from bench.records import Record

OURS = "npo_kernels/triton"
SMALL = "npo_kernels/triton/256MiB"


@dataclass(frozen=True)
class Outcome:
    """`text` is the measured value; its records have the machine and the date."""

    text: str
    records: tuple[Record, ...]


Measure = Callable[["Results"], Outcome | None]


class Results:
    """Records of one GPU's measurements in bfloat16, looked up by their fields."""

    def __init__(self, records: Iterable[Record]):
        self.records = [
            r for r in records if r["gpu"] and r["status"] == "ok" and r["dtype"] == "bfloat16" and r["l2"] != "cold"
        ]

    def find(self, **fields) -> list[Record]:
        return [r for r in self.records if all(r[name] == value for name, value in fields.items())]

    def best(self, **fields) -> Record | None:
        """The smallest value."""
        return min(self.find(**fields), key=lambda r: r["value"], default=None)

    def peers(self, **fields) -> Record | None:
        others = [r for r in self.find(**fields) if not r["provider"].startswith("npo_kernels/")]
        return min(others, key=lambda r: r["value"], default=None)


def ratio(ours: Record | None, theirs: Record | None) -> Outcome | None:
    if ours is None or theirs is None:
        return None
    text = f"{ours['value'] / theirs['value']:.2f}x ({ours['value']:.4g} against {theirs['value']:.4g}, "
    return Outcome(text + f"{theirs['provider']})", (ours, theirs))


def against(mode: str, computes: str) -> Measure:
    """Ours at R in a mode, against the fastest exact peer that computes `computes`."""
    what = "logprobs" if mode == "logprobs" else "fwd_bwd"
    fields = {"case": R.name, "mode": mode, "what": what, "metric": "ms", "suite": "head"}
    return lambda results: ratio(
        results.best(provider=OURS, **fields), results.peers(computes=computes, exact=True, **fields)
    )


def share_of_ceiling(results: Results) -> Outcome | None:
    """Share of the rate of the 8192^3 product that `certify` measures on the same GPU."""
    found = results.find(case=R.name, provider=OURS, mode="full", metric="tflops", suite="head")
    ceiling = results.find(suite="ceilings", metric="tflops")
    if not found or not ceiling:
        return None
    share = found[0]["value"] / ceiling[0]["value"]
    return Outcome(f"{share:.0%} of {ceiling[0]['value']:.0f} TFLOP/s", (found[0], ceiling[0]))


def worst(ratios: Iterable[Outcome | None]) -> Outcome | None:
    """The largest of the measured ratios."""
    measured = [ratio for ratio in ratios if ratio is not None]
    return max(measured, key=lambda r: r.records[0]["value"] / r.records[1]["value"], default=None)


def tofu(results: Results) -> Outcome | None:
    """The worst of the heads."""
    outcomes = []
    for case in {r["case"] for r in results.find(suite="tofu", metric="ms")}:
        fields = {"suite": "tofu", "case": case, "what": "fwd_bwd", "metric": "ms"}
        usable = [r for r in results.find(**fields) if r["provider"].startswith(("trl/", "liger/dpo", "liger/kto"))]
        theirs = min(usable, key=lambda r: r["value"], default=None)
        outcomes.append(ratio(results.best(provider=OURS, **fields), theirs))
    return worst(outcomes)


def memory(provider: str, with_time: bool) -> Measure:
    """Peak beyond inputs and gradients at R, as a share of plain PyTorch's."""

    def measure(results: Results) -> Outcome | None:
        fields = {"suite": "memory", "case": R.name, "mode": "full", "metric": "peak_mb"}
        ours, plain = (results.best(provider=name, **fields) for name in (provider, "plain/eager"))
        if ours is None or plain is None:
            return None
        gradients = 2 * (R.N + R.head.V) * R.head.H / 2**20
        used, theirs = ours["value"] - gradients, plain["value"] - gradients
        text = f"{used / theirs:.1%} ({used:.0f} MiB of {theirs:.0f})"
        records = [ours, plain]
        if with_time:
            timed = {"suite": "head", "case": R.name, "mode": "full", "what": "fwd_bwd", "metric": "ms"}
            slow, fast = (results.best(provider=name, **timed) for name in (provider, OURS))
            if slow is None or fast is None:
                return None
            text += f" at {slow['value'] / fast['value']:.2f}x the time"
            records += [slow, fast]
        return Outcome(text, tuple(records))

    return measure


def growth(results: Results) -> Outcome | None:
    fields = {"suite": "scaling", "provider": OURS}
    wanted = {"time over N": ("over N", "exponent_ms"), "time over V": ("over V", "exponent_ms")}
    wanted["memory over N"] = ("over N", "exponent_mb")
    found = {name: results.find(case=case, metric=metric, **fields) for name, (case, metric) in wanted.items()}
    if not all(found.values()):
        return None
    text = ", ".join(f"{name}: exponent {rs[0]['value']:.3f}" for name, rs in found.items())
    return Outcome(text, tuple(rs[0] for rs in found.values()))


def accuracy(results: Results) -> Outcome | None:
    """Our error over that of plain PyTorch, in the worst case."""
    ours = results.find(suite="accuracy", provider=OURS)
    outcomes = [
        ratio(r, results.best(suite="accuracy", provider="plain/eager", case=r["case"], tensor=r["tensor"]))
        for r in ours
    ]
    return worst(outcomes)


def step(results: Results) -> Outcome | None:
    parts: list[str] = []
    records: list[Record] = []
    for metric in ("tokens_per_s", "max_batch"):
        fields = {"suite": "step", "case": "llama-3.2-1b/step", "metric": metric}
        ours, live = (results.best(provider=name, **fields) for name in (OURS, "plain/live"))
        if ours is None or live is None:
            return None
        parts.append(f"{ours['value'] / live['value']:.2f}x {metric}")
        records += [ours, live]
    return Outcome(", ".join(parts), tuple(records))


@dataclass(frozen=True)
class Target:
    what: str
    target: str
    suites: tuple[str, ...]  # the suites to run
    measure: Measure


TARGETS = (
    Target(
        "NPO fwd+bwd at R, both gradients, against the best exact peer that takes a weight per sequence",
        "<= 0.75x its time",
        ("head",),
        against("full", "npo"),
    ),
    Target(
        "the same against the best scalar cross-entropy kernel (which does less)",
        "<= 1.05x its time",
        ("head",),
        against("full", "ce"),
    ),
    Target(
        "share of the measured matrix-product ceiling, counting 6NHV",
        ">= 90 %",
        ("head",),
        share_of_ceiling,
    ),
    Target("frozen head, against the best exact peer", "<= 0.55x", ("head",), against("frozen", "npo")),
    Target(
        "log-probs only, against one cuBLAS product of the same shape",
        "<= 1.10x",
        ("head",),
        against("logprobs", "product"),
    ),
    Target(
        "TOFU batch (32 + 32 answers), worst of three heads, against TRL and Liger's preference losses",
        "<= 0.5x",
        ("tofu",),
        tofu,
    ),
    Target(
        "peak memory beyond inputs and gradients at R, fastest mode",
        "<= 25 % of plain PyTorch's",
        ("memory",),
        memory(OURS, False),
    ),
    Target(
        "the same with workspace_mb=256",
        "<= 5 % of plain PyTorch's and <= 320 MB, at <= 1.35x the fastest mode's time",
        ("memory", "head"),
        memory(SMALL, True),
    ),
    Target(
        "growth, N = 2k to 64k",
        "time linear in N and V within 5 %, memory flat in N",
        ("scaling",),
        growth,
    ),
    Target(
        "error of logp, dX, dW against float64, worst ratio to plain bfloat16 PyTorch's",
        "never above it; logp <= 1e-5 relative",
        ("accuracy",),
        accuracy,
    ),
    Target(
        "a whole TOFU NPO step (forget + retain), against logits and a live reference model",
        ">= 2x tokens/s and >= 4x the batch that fits",
        ("step",),
        step,
    ),
)
