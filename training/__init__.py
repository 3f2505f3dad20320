"""Unlearning of language models with npo_kernels, run from the checkout.

The engine is the modules of this folder. `methods` and `benchmarks` plug into it, `commands` has the command lines,
`reports` the tables and figures, `papers` experiments of papers without a language model, and `pretrained` the study on
a pre-trained model.

`python -m training.unlearn` runs `commands/unlearn.py`: the line below adds that folder to the package's path.
"""

from pathlib import Path

__path__.append(str(Path(__file__).parent / "commands"))
