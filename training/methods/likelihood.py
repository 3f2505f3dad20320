"""Methods on the likelihood of answers: gradient ascent, and answering "I don't know".

`mean_tok` is the mean over the scored tokens of all rows of the step. With a retain term gradient ascent is what
OpenUnlearning calls GradDiff.
"""

from torch import Tensor

from training.methods.base import register_family
from training.methods.rows import Batch
from training.methods.settings import Settings


def gradient_ascent(batch: Batch, settings: Settings) -> Tensor:
    return -batch.nll("forget")


def refusal(batch: Batch, settings: Settings) -> Tensor:
    return batch.nll("idk")


register_family(
    "ga",
    "GA",
    formula="mean_tok log p(forget)",
    paper="arXiv 2404.05868, eq. 2",
    loss=gradient_ascent,
    colour="#D55E00",
    aliases={"": ("GradAscent",), "_rt": ("grad_diff", "GradDiff")},
)
register_family(
    "idk",
    "IDK",
    formula='mean_tok -log p("I don\'t know" answers)',
    paper="arXiv 2401.06121",
    loss=refusal,
    colour="#8A8A8A",
    rows=("idk",),
)
