"""TOFU unlearning with npo_kernels, run from the checkout: an engine, and wings around it.

The engine is the modules of this folder. `methods` and `benchmarks` plug into it, `commands` are its command lines,
`reports` its tables and figures, `papers` experiments of the papers that need no language model, `pretrained` the one
that needs one.

`python -m training.unlearn` is `commands/unlearn.py`: the next line lets Python look there as well.
"""

from pathlib import Path

__path__.append(str(Path(__file__).parent / "commands"))
