"""Attacks at the end of unlearning: options of unlearn and grid."""

from dataclasses import dataclass
from typing import Annotated

from training.quantization import FORMATS, formats_named


@dataclass(frozen=True)
class AttackedOptions:
    """Attacks on the unlearned model. It is evaluated again after each of them."""

    rounded: Annotated[
        str, f"round the weights to each of these formats, separated by commas: {', '.join(FORMATS)}"
    ] = ""
    relearn: Annotated[float, "fine-tune on this share of the forget set; 0: do not"] = 0.0
    relearn_epochs: Annotated[int, "epochs of --relearn"] = 5
    relearn_lr: Annotated[float | None, "learning rate of --relearn. None: same as unlearning"] = None

    def check_attacks(self) -> list[str]:
        """The formats. ValueError if an option is invalid."""
        if not 0 <= self.relearn < 1:
            raise ValueError(f"--relearn: expected a share of the forget set, 0 to 1, got {self.relearn}")
        if self.relearn_epochs < 1 or (self.relearn_lr is not None and not self.relearn_lr > 0):
            raise ValueError(
                f"--relearn_epochs, --relearn_lr: expected more than 0, got {self.relearn_epochs} and {self.relearn_lr}"
            )
        return formats_named(self.rounded)
