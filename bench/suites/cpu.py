"""The torch path on a CPU against plain PyTorch and the peers that run there: time and peak memory, isolated.

smollm2    the head of SmolLM2-135M
wide       a large vocabulary on a small model: the logits dominate
llama      the head of Llama-3.2-1B, few rows: the products dominate
wide-long  "wide" as one sequence, too long for a slab: the recompute mode, with one more product

In float32 and both 16-bit dtypes. plain/eager computes its log-softmax in float32, as transformers does, plain/rounded
in the dtype of the logits; plain/products has only the products, the ceiling. With --seconds a provider whose turn
takes longer is stopped, and its record has the status "slow" and `over_ms`; a peer that was too slow for a case does
not run larger ones in the same dtype. PyTorch takes minutes for bfloat16 on a CPU without instructions for it:

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m bench run --suite cpu

limits a CPU that has them to the older instructions; `cpu_limits` records this.
"""

from collections.abc import Iterator
from dataclasses import replace

from bench.cases import HEADS, Case, Head, even
from bench.memory import isolated
from bench.options import Options
from bench.records import Record

DTYPES = ("float32", "bfloat16", "float16")
WIDE = Head(64, 128256)
SHAPES = (  # of the targets, the smallest first
    even("smollm2", HEADS["smollm2-135m"], N=1024, B=16),
    even("wide", WIDE, N=4096, B=32),
    even("llama", HEADS["llama-3.2-1b"], N=512, B=16),
)
CASES = (*SHAPES, even("wide-long", WIDE, N=4096, B=1))
NEEDED = ("npo_kernels/torch", "plain/products", "plain/eager", "plain/rounded")  # for the targets
PEERS = (
    "plain/compile",
    "torch/linear_ce-none",
    "liger/scaled",
    "trl/chunked",
)


def cases(toy: bool) -> list[Case]:
    return [even("toy", HEADS["toy"], N=96, B=4)] if toy else list(CASES)


def run(options: Options) -> Iterator[Record]:
    for dtype in options.dtypes or (options.dtype,):
        slow: set[str] = set()
        for case in options.chosen(cases(options.toy)):
            if case.B == 1 and dtype != "float32":
                continue
            wanted = [*NEEDED, *PEERS] if options.providers == ("*",) else [*options.provider_names]
            if case.B == 1 and options.providers == ("*",):
                wanted = ["npo_kernels/torch", "plain/eager"]
            names = tuple(name for name in wanted if name in NEEDED or name not in slow)
            for r in isolated(replace(options, dtype=dtype, providers=names), [case], times=True, reps=options.reps):
                if r["status"] == "slow":
                    slow.add(r["provider"])
                yield r
