"""`python -m tools.dist_check FILE ... [--constraint FILE]`: each distribution works in an empty environment.

For every wheel or source distribution: a new environment, `pip install`, a first use from an empty folder, and
`python -m npo_kernels.env`. The last environment also gets `kernels` and loads the folder that `make kernel-hub`
wrote, if there is one. Needs a package index. The environments have the Python that runs this.
"""

import argparse
import subprocess
import tempfile
import venv
from pathlib import Path

from tools.release import ROOT, version

KERNEL = ROOT / "build" / "kernel-hub"
# A first use, without Transformers. Against its own reference the first loss is (2 / beta) ln 2.
FIRST_USE = """
import math, torch
from npo_kernels import fused_npo_loss, sequence_logprobs

torch.manual_seed(0)
hidden = torch.randn(2, 16, 64, requires_grad=True)
weight = torch.randn(512, 64, requires_grad=True)
labels = torch.randint(0, 512, (2, 16))
with torch.no_grad():
    ref_logps, num_tokens = sequence_logprobs(hidden, weight, labels)
loss = fused_npo_loss(hidden, weight, labels, ref_logps=ref_logps, beta=0.1)
loss.backward()
assert num_tokens.tolist() == [15, 15], num_tokens
assert math.isclose(loss.item(), 20 * math.log(2), rel_tol=1e-5), loss
assert hidden.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0
"""
WHERE = "import npo_kernels, importlib.metadata as m; print(npo_kernels.__file__, m.version('npo-kernels'))"
FROM_KERNELS = """
from pathlib import Path
import torch
from kernels import get_local_kernel
import npo_kernels

kernel = get_local_kernel(Path({folder!r}), backend="cpu")
hidden, weight, labels = torch.randn(2, 16, 64), torch.randn(512, 64), torch.randint(0, 512, (2, 16))
logps = [library.sequence_logprobs(hidden, weight, labels)[0] for library in (npo_kernels, kernel)]
assert torch.equal(*logps), logps
print(kernel.__name__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))[:200]}\n{done.stdout}\nexit code {done.returncode}")
    return done.stdout


def check(distribution: Path, constraint: list[str], with_kernel: bool) -> None:
    """Raise SystemExit unless the distribution installs and works."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        empty = folder / "empty"
        empty.mkdir()
        python = folder / "venv" / "bin" / "python"
        quiet = ["--quiet", "--disable-pip-version-check"]
        install: list[str | Path] = [python, "-m", "pip", "install", *quiet, *constraint]
        run(*install, distribution, cwd=empty)
        where, installed = run(python, "-I", "-c", WHERE, cwd=empty).split()
        if not Path(where).is_relative_to(folder) or installed != version():
            raise SystemExit(f"{distribution}: expected version {version()} in {folder}, got {installed} in {where}")
        run(python, "-I", "-c", FIRST_USE, cwd=empty)
        print(f"{distribution.name}: works")
        print(run(python, "-I", "-m", "npo_kernels.env", cwd=empty), end="")
        if with_kernel:
            run(*install, "kernels>=0.17", "numpy", cwd=empty)
            print("kernels:", run(python, "-I", "-c", FROM_KERNELS.format(folder=str(KERNEL)), cwd=empty), end="")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.dist_check", description="Try distributions in empty venvs.")
    parser.add_argument("distributions", nargs="+", type=Path, metavar="FILE", help="wheels and source distributions")
    parser.add_argument("--constraint", type=Path, help="a file of constraints for pip")
    options = parser.parse_args(arguments)
    constraint = ["--constraint", str(options.constraint.resolve())] if options.constraint else []
    files = [file.resolve() for file in options.distributions]
    for file in files:
        check(file, constraint, with_kernel=file == files[-1] and KERNEL.exists())


if __name__ == "__main__":
    main()
