"""PDU: logits on the forget set are made flat, as long as the retain loss stays below a bound."""

from torch import Tensor

from training.methods.base import register_family
from training.methods.rows import Batch
from training.methods.settings import Settings


def pdu(batch: Batch, settings: Settings) -> Tensor:
    """Primal-dual unlearning: mean_t (max_v z_tv - mean_v z_tv)^2.

    Beside a retain term its weight is the multiplier of `retain <= epsilon`: after every optimiser step

        retain_weight = max(0, retain_weight + dual_lr * (retain - epsilon)),

    with the retain term of the whole step, over all processes (`training.dual`). The published code updates it after
    every micro-batch, by the loss of that one and a weight of its own in each process: `dual_update="micro_batch"`. It
    takes the logits where the token itself stands and not where it is predicted: `published_rows`. The settings are
    those of its TOFU runs: weight 100, epsilon 0.3, dual_lr 5, 5 epochs of warm-up. Source: arXiv 2506.05314.
    """
    z = batch.rows("forget").statistics
    return batch.token_mean((z["max_logit"] - z["mean_logit"]).square())


register_family(
    "pdu",
    "PDU",
    formula="mean_tok (max_v z_v - mean_v z_v)^2",
    paper="arXiv 2506.05314",
    loss=pdu,
    colour="#999933",
    reads="statistics",
    statistics=("max_logit", "mean_logit"),
    dual=True,
    published_rows="label",
    rt={"retain_weight": 100.0, "epsilon": 0.3, "dual_lr": 5.0, "dual_warmup_epochs": 5.0},
    aliases={"_rt": ("PDU",)},
)
