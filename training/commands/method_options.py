"""The constants of the methods as options, and the methods as a table, for the commands that unlearn."""

from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, get_args

from training.config import Switch
from training.methods import METHODS, Method, Settings
from training.methods.settings import Compat, DualUpdate, Positions, Teacher


@dataclass(frozen=True)
class MethodOptions:
    """Constants of the methods. None: the default of the method."""

    beta: Annotated[
        float | None, "inverse temperature; WGA, SatImp: exponent of p; UNDIAL: how much the label's logit is lowered"
    ] = None
    gamma: Annotated[float | None, "SimNPO's margin"] = None
    forget_weight: Annotated[float | None, "weight of the forget term"] = None
    retain_weight: Annotated[float | None, "weight of the retain term; PDU: its initial value"] = None
    kl_positions: Annotated[
        Positions | None,
        "positions at which a KL term or RMU compares the models. None: answer with --compat paper, else all",
    ] = None
    compat: Annotated[
        Compat, "npo-repo, open-unlearning: follow the code of these projects where it differs from the papers"
    ] = "paper"  # fmt: skip
    beta2: Annotated[float | None, "SatImp: exponent of 1 - p"] = None
    skip_tokens: Annotated[int | None, "CE-U: number of first tokens of an answer that are left out"] = None
    epsilon: Annotated[float | None, "PDU: upper bound on the retain term"] = None
    dual_lr: Annotated[float | None, "PDU: step size of the retain weight; 0: the weight is constant"] = None
    dual_warmup_epochs: Annotated[float | None, "PDU: epochs before the retain weight is updated"] = None
    dual_update: Annotated[
        DualUpdate | None, "PDU: when the retain weight is updated. None: step, or micro_batch with open-unlearning"
    ] = None
    teacher: Annotated[
        Teacher | None, "UNDIAL: use cached last hidden states, or run the frozen model in every step. None: cache"
    ] = None
    published_rows: Annotated[
        Switch, "UNDIAL, PDU, RMU: use the positions of OpenUnlearning's code. auto: on with --compat open-unlearning"
    ] = "auto"
    layer: Annotated[int | None, "RMU: decoder layer that is steered, from 0. None: 7, or the last one"] = None
    steering: Annotated[
        float | None, "RMU: norm of the target; adaptive RMU: relative to the norm of the activations"
    ] = None
    top_k: Annotated[int | None, "DiPO: number of logits that are raised and lowered"] = None
    shift: Annotated[float | None, "DiPO: how much they are raised and lowered"] = None


def settings_of(method: Method, options: MethodOptions, seed: int) -> Settings:
    """Options given, then what --compat implies, then the defaults of the method."""
    if options.published_rows not in get_args(Switch):
        expected = ", ".join(get_args(Switch))
        raise ValueError(f"--published_rows: expected one of {expected}, got {options.published_rows!r}")
    ours, published = options.compat == "paper", options.compat == "open-unlearning"
    given = {f.name: getattr(options, f.name) for f in fields(MethodOptions)} | {"seed": seed}
    given["kl_positions"] = options.kl_positions or ("answer" if ours else "all")
    given["dual_update"] = options.dual_update or ("micro_batch" if published else "step")
    given["published_rows"] = published if options.published_rows == "auto" else options.published_rows == "on"
    return method.settings(**given)


def resolved(settings: Settings) -> dict[str, Any]:
    """The settings as options, for the record of a run."""
    return asdict(settings) | {"published_rows": "on" if settings.published_rows else "off"}


def list_of_methods() -> str:
    """A line for each: name, cost (products with the head, what is kept of the reference), source, what forgets."""
    rows = [("method", "cost", "source", "what forgets")]
    rows += [(method.name, method.cost, method.source, method.formula) for method in METHODS.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
