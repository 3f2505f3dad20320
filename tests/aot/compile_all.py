"""Every kernel compiled ahead of time for every target, without a GPU: registers, spills, shared memory, tensor cores
and asynchronous copies.

    make aot                           # the variants that need most of each tile: a quarter of an hour on two cores
    make aot ARGS=--brief              # what the test compiles: bfloat16 on sm_90, a few kernels elsewhere
    make aot ARGS=--all                # every variant
    make aot ARGS=--update             # write what is compiled down in golden.json, after any change of a kernel
    make aot ARGS="--target sm_90"     # one target; can be combined with the others

The kernels are specialised as Triton's JIT would specialise them for a call at the shape N=8191, H=4096, V=128256: an
argument that is 1 is a constant, pointers and other integers divisible by 16 are marked as such.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from csrc_triton import tiles

GOLDEN = Path(__file__).with_name("golden.json")
KIB = 1024

# ---------------------------------------------------------------------------------------------------------------------
# What there is to compile
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A GPU, the row of the tile table it uses, and what of a processor (SM, CU) its programs share."""

    backend: str
    arch: int | str
    warp: int  # threads
    tiles: str
    program_shared: int  # bytes of shared memory, of one program
    shared: int  # bytes, of all programs
    threads: int
    programs: int


# CUDA C++ Programming Guide, table of technical specifications per compute capability; CDNA3 ISA guide
TARGETS = {
    "sm_80": Target("cuda", 80, 32, "sm_80", 163 * KIB, 164 * KIB, 2048, 32),
    "sm_86": Target("cuda", 86, 32, "sm_86", 99 * KIB, 100 * KIB, 1536, 16),
    "sm_89": Target("cuda", 89, 32, "sm_86", 99 * KIB, 100 * KIB, 1536, 24),
    "sm_90": Target("cuda", 90, 32, "sm_90", 227 * KIB, 228 * KIB, 2048, 32),
    "sm_100": Target("cuda", 100, 32, "sm_100", 227 * KIB, 228 * KIB, 2048, 32),
    "sm_120": Target("cuda", 120, 32, "sm_120", 99 * KIB, 100 * KIB, 1536, 24),
    "gfx942": Target("hip", "gfx942", 64, "gfx942", 64 * KIB, 64 * KIB, 2048, 32),
}

# tf32 is float32 whose products may use the tensor cores (torch.set_float32_matmul_precision)
DTYPES = ("bf16", "fp16", "fp32", "tf32")

# Arguments are called the same in all kernels. Pointers: "T" is the dtype of the operands. Descriptors: their blocks.
ARGUMENTS = {
    "x_desc": ("BLOCK_N", "BLOCK_H"), "w_desc": ("BLOCK_V", "BLOCK_H"),
    "ref_x_desc": ("BLOCK_N", "BLOCK_H"), "ref_w_desc": ("BLOCK_V", "BLOCK_H"),
    "ref_x_ptr": "*T", "ref_w_ptr": "*T", "ref_bias_ptr": "*T", "ref_anchor_ptr": "*fp32",
    "ref_scale_ptr": "*fp32", "shift_ptr": "*fp32", "kl_ptr": "*fp32", "target_shift": "fp32",
    "x_ptr": "*T", "w_ptr": "*T", "bias_ptr": "*T", "slab_ptr": "*T", "out_ptr": "*T", "formed_ptr": "*T",
    "labels_ptr": "*i64", "offsets_ptr": "*i32", "counts_ptr": "*i32", "sequence_ptr": "*i64", "num_tokens_ptr": "*i64",
    "hidden_ptr": "*T", "normalizer_ptr": "*fp32", "weights_ptr": "*fp32", "token_grad_ptr": "*fp32",
    "logps_grad_ptr": "*fp32",
    "target_ptr": "*i64", "index_ptr": "*i64", "sorted_ptr": "*i64", "order_ptr": "*i64", "starts_ptr": "*i64",
    "dirty_ptr": "*i32",
    "total_ptr": "*fp32", "first_ptr": "*fp32", "second_ptr": "*fp32", "logits_ptr": "*fp32", "argmax_ptr": "*i64",
    "center_ptr": "*fp32", "constant_ptr": "*fp32", "linear_ptr": "*fp32", "square_ptr": "*fp32", "flat_ptr": "*fp32",
    "anchor_ptr": "*fp32", "raised_ptr": "*fp32", "sum_ptr": "*fp32", "max_ptr": "*fp32", "part_ptr": "*fp32",
    "z_ptr": "*fp32", "logp_ptr": "*fp32", "miss_ptr": "*fp32", "prob_scale_ptr": "*fp32",
    "logps_ptr": "*fp32", "loss_ptr": "*fp32", "offset_ptr": "*fp32",
    "scale_ptr": "*fp32", "coef_ptr": "*fp32", "row_coef_ptr": "*fp32",
    "target_coef_ptr": "*fp32", "product_ptr": "*fp32", "grad_ptr": "*fp32",
    "logit_scale": "fp32", "softcap": "fp32", "headroom": "fp32", "beta": "fp32", "sign": "fp32",
    "T": 16384, "B": 31, "length": 528, "steps": 5, "blocks": 16, "ignore_index": -100, "stride_hidden": 4096,
    "unit_ptr": "*fp32", "upstream_ptr": "*fp32", "size": 128256 * 4096,
    "N": 8191, "V": 128256, "H": 4096, "H_REF": 4096, "begin": 16384, "splits": 126,
    "stride_x": 4096, "stride_w": 4096, "stride_ref_x": 4096, "stride_ref_w": 4096, "stride_slab": 128256,
    "stride_grad": 4096,
}  # fmt: skip


def with_rows(length: int, **others: int) -> dict[str, int]:
    """Hidden states and heads whose rows are `length` long."""
    names = ("H", "H_REF", "stride_x", "stride_hidden", "stride_w", "stride_ref_x", "stride_ref_w", "stride_grad")
    return {**dict.fromkeys(names, length), **others}


# A row length that no tile divides, 16-byte aligned or not; a batch of one row, a vocabulary of one split.
SHAPES = {
    "": {},
    "ragged": with_rows(4112, V=50257, stride_slab=50304),
    "odd": with_rows(4097, V=50257, stride_slab=50304),
    "one": with_rows(1, N=1, B=1, V=1, splits=1, begin=0, stride_slab=64),
}
# Beyond 2 GB at that shape, so that AMD's buffer instructions are out of the question.
LARGE = ("slab_ptr", "grad_ptr")

OPTIONAL = {
    "bias_ptr": "HAS_BIAS",
    "ref_bias_ptr": "HAS_REF_BIAS",
    "slab_ptr": "STORE",
    "sum_ptr": "SUMS",
    "max_ptr": "MAXIMA",
    "dirty_ptr": "REPAIR",
    "offsets_ptr": "PACKED",
    "normalizer_ptr": "HAS_NORMALIZER",
    "weights_ptr": "HAS_WEIGHTS",
    "token_grad_ptr": "HAS_TOKENS",
    "logps_grad_ptr": "HAS_LOGPS",
    "target_ptr": "HAS_TARGET",
    "kl_ptr": "REVERSE",
    "unit_ptr": "HAS_UNIT",
}
# what exp_logits_kernel is launched for -> (STORE, SUMS, MAXIMA, REPAIR)
USES = {
    "statistics": (False, True, True, False),
    "slab": (True, True, True, False),
    "repair": (True, True, False, True),
    "repair-statistics": (False, True, False, True),
    "recompute": (True, False, False, False),
}


def persistent(kernel: str) -> str:
    """The name of its twin with a program a processor."""
    return kernel.replace("_kernel", "_persistent_kernel")


ROW_KERNELS = {  # module, kernel -> variants
    ("compaction", "count_scored_kernel"): ("", "packed"),
    ("compaction", "write_rows_kernel"): ("", "packed"),
    ("compaction", "gather_rows_kernel"): ("",),
    ("sequence_epilogue", "sequence_scale_kernel"): ("", "normalizer+weights"),
    ("sequence_epilogue", "coefficients_kernel"): ("", "tokens+softcap"),
    ("target_logit", "target_logit_kernel"): ("", "bias", "bias+softcap"),
    ("row_statistics", "reanchor_kernel"): ("",),
    ("row_statistics", "row_statistics_kernel"): ("",),
    ("sequence_epilogue", "sequence_sums_kernel"): ("",),
    ("sequence_epilogue", "ratio_epilogue_kernel"): ("", "softcap", "normalized"),
    ("gradient_rows", "scale_rows_kernel"): ("",),
    ("gradient_rows", "finish_hidden_grad_kernel"): ("",),
    ("gradient_rows", "add_targets_kernel"): ("",),
    ("gradient_rows", "scale_gradient_kernel"): ("", "unit"),
}
MOMENTS = ("row_moments_kernel", "row_moments_persistent_kernel", "moment_gradient_kernel")
PAIR_KERNELS = ("softmax_sums_kernel", "kl_logits_kernel")
PRODUCTS = (
    "exp_logits_kernel",
    "exp_logits_persistent_kernel",
    *PAIR_KERNELS,
    *map(persistent, PAIR_KERNELS),
    *MOMENTS,
)


@dataclass(frozen=True)
class Case:
    """One compilation. `variant` joins a use and options with "+", such as "slab+bias+ragged": last the hidden bucket
    of the tile ("h4096"), unless it is the one for all that have none of their own."""

    target: str
    module: str
    kernel: str
    variant: str
    dtype: str

    @property
    def name(self) -> str:
        return " ".join((self.target, self.kernel, self.variant or "-", self.dtype))

    def has(self, option: str) -> bool:
        return option in self.variant.split("+")

    @property
    def bits(self) -> int:
        return 16 if self.dtype in ("bf16", "fp16") else 32

    @property
    def tile(self) -> tiles.Tile | None:
        """Of a product: that of the table, or a persistent one that is not in it. None: there is no such entry."""
        table, candidates = tiles.TILES, tiles.PERSISTENT_CANDIDATES
        if self.module == "linear_kl":
            table, candidates = tiles.PAIR_TILES, tiles.PERSISTENT_PAIR_CANDIDATES
        bucket = next((b for b in tiles.HIDDEN_BUCKETS if self.has(f"h{b}")), tiles.ANY_HIDDEN)
        key = TARGETS[self.target].tiles, self.bits, bucket
        if "persistent" in self.kernel and self.kernel not in MOMENTS and not (key in table and table[key].loop):
            table = candidates
        found = table.get(key)
        if found and self.kernel == "row_moments_persistent_kernel":
            return found._replace(loop="flat")  # of MOMENT_LOOPS, whatever the projection's tile says
        return found


def with_buckets(case: Case) -> list[Case]:
    """A case of a product for every hidden bucket that has a tile."""
    options = ["", *(f"+h{bucket}" for bucket in tiles.HIDDEN_BUCKETS)]
    found = [replace(case, variant=case.variant + option) for option in options]
    return [case for case in found if case.tile]


def cases(target: str, everything: bool) -> list[Case]:
    """Of one target: every variant, or the ones that need most of a tile.

    A persistent tile is compiled for both kernels: the plain one has the rows that no descriptor can be made of.
    """
    found = []
    for dtype, shape, use, bias, softcap in product(DTYPES, SHAPES, USES, ("", "bias"), ("", "softcap")):
        variant = "+".join(filter(None, (use, bias, softcap, shape)))
        representative = bool(bias) == bool(softcap) and shape == "" and use == "slab"
        if dtype == "bf16":
            representative |= bool(bias) == bool(softcap) and shape == "" and use == "statistics"
            representative |= variant in ("recompute", "repair", "slab+ragged", "slab+bias+softcap+odd")
            representative |= variant in ("statistics+one", "slab+bias+softcap+one") and target == "sm_90"
        chosen = representative or (everything and shape != "one" and (shape == "" or dtype == "bf16"))
        if chosen:
            found += with_buckets(Case(target, "exp_logits", "exp_logits_kernel", variant, dtype))
        if chosen and shape in ("", "ragged"):
            found += with_buckets(Case(target, "exp_logits", "exp_logits_persistent_kernel", variant, dtype))
    pairs = []  # (kernel, variant, dtype)
    for dtype, use, options in product(DTYPES, ("value", "gradient"), ("", "bias+softcap")):
        if everything or (use == "gradient" and (dtype == "bf16" or options)):
            pairs.append(("kl_logits_kernel", "+".join(filter(None, (use, options))), dtype))
            if use == "gradient":
                pairs.append(("softmax_sums_kernel", options, dtype))
    for dtype, options in product(DTYPES, ("target", "bias+softcap+target")):
        if everything or (dtype == "bf16") == (options == "target"):
            pairs += [("kl_logits_kernel", f"gradient+{options}{d}", dtype) for d in ("", "+reverse")]
            pairs.append(("softmax_sums_kernel", options, dtype))
    for kernel, variant, dtype in pairs:
        for twin in (kernel, persistent(kernel)):
            found += with_buckets(Case(target, "linear_kl", twin, variant, dtype))
    for dtype, kernel, variant in product(DTYPES, MOMENTS, ("", "bias+softcap", "bias+softcap+odd")):
        if kernel == "row_moments_persistent_kernel" and (target != "sm_90" or dtype != "bf16" or "odd" in variant):
            continue
        if everything or variant == "bias+softcap" or (dtype == "bf16" and variant == ""):
            found += with_buckets(Case(target, "row_moments", kernel, variant, dtype))
    for (module, kernel), variants in ROW_KERNELS.items():
        for variant, dtype in product(variants, ("bf16", "fp32")):
            found.append(Case(target, module, kernel, variant, dtype))
        if target == "sm_90":
            found.append(Case(target, module, kernel, "one", "bf16"))
    return found


def brief(case: Case) -> bool:
    """Whether the test compiles it: of every product in bfloat16 what needs most registers; on sm_90 persistent kernels
    too, the slab at H = 4096 and what is done row by row. That golden.json is of these kernels is another test.
    """
    if case.dtype != "bf16" or any(map(case.has, ("one", "ragged", "odd", "h2048"))):
        return False
    if case.variant == "slab+h4096" or case.kernel not in PRODUCTS:
        return case.target == "sm_90"
    most = case.has("bias") and not case.has("h4096")
    return most and (case.target == "sm_90" or "persistent" not in case.kernel)


# ---------------------------------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------------------------------


def constants(case: Case, parameters: list[str], whole: set[str]) -> tuple[dict, dict]:
    """(values of the constexpr parameters of the kernel, options of the compiler); nothing is known of the `whole`."""
    shape = {**ARGUMENTS, **next((SHAPES[s] for s in SHAPES if s and case.has(s)), {})}
    values = {
        "HAS_BIAS": case.has("bias"),
        "HAS_SOFTCAP": case.has("softcap"),
        "HAS_UNIT": case.has("unit"),
        "LENGTH_NORMALIZED": case.has("normalized"),
        "SHIFT": True,
        "PACKED": case.has("packed"),
        "MEAN": True,
        "HAS_NORMALIZER": case.has("normalizer"),
        "HAS_WEIGHTS": case.has("weights"),
        "HAS_TOKENS": case.has("tokens"),
        "HAS_LOGPS": True,
        "BLOCK_T": tiles.BLOCK_POSITIONS,
        "BLOCK_H": min(tiles.BLOCK_HIDDEN, 1 << (shape["H"] - 1).bit_length()),
        "BLOCK_N": tiles.BLOCK_ROWS,
        "BLOCK_RUN": tiles.BLOCK_RUN,
        "BLOCK": tiles.BLOCK_SCALED,
    }
    of_positions = case.kernel in ("count_scored_kernel", "write_rows_kernel")
    options = {"num_warps": tiles.POSITION_WARPS if of_positions else tiles.ROW_WARPS}
    if case.kernel == "reanchor_kernel":
        values["BLOCK_N"] = tiles.TILES[TARGETS[case.target].tiles, case.bits, tiles.ANY_HIDDEN].block_n
    if case.module == "linear_kl":
        values |= {"HAS_REF_BIAS": case.has("bias"), "HAS_TARGET": case.has("target")}
        values |= {"STORE": case.has("gradient"), "REVERSE": case.has("reverse")}
    if case.module == "exp_logits":
        flags = USES[case.variant.split("+")[0]]
        values |= dict(zip(("STORE", "SUMS", "MAXIMA", "REPAIR"), flags, strict=True))
    if case.kernel in PRODUCTS:
        tile = case.tile
        values |= {
            "BLOCK_N": tile.block_n,
            "BLOCK_V": tile.block_v,
            "BLOCK_H": tile.block_h,
            "EVEN_H": shape["H"] % tile.block_h == 0,
            "ALIGNED": all(shape[name] % 16 == 0 for name in ("H", "stride_x", "stride_w")),
            "SPLIT_TILES": tile.split_tiles,
            "GROUP": tile.group,
            "PIECES": tile.pieces
            * (tiles.GRADIENT_PIECES[case.bits] if case.kernel == "moment_gradient_kernel" else 1),
            "UPCAST": False,
            "PRECISION": "tf32" if case.dtype == "tf32" else "ieee",
        }
        warps = tiles.MOMENT_WARPS if case.kernel in MOMENTS else tile.num_warps
        options = {"num_warps": warps, "num_stages": tile.num_stages}
    if "persistent" in case.kernel and case.kernel not in MOMENTS:
        merged = tile.loop != "serial" and values.get("SUMS", True) and not values.get("REPAIR", False)
        values |= {"FLATTEN": merged, "SPECIALIZE": merged and tile.loop == "specialized"}
    if case.kernel == "row_moments_persistent_kernel":
        values["FLATTEN"] = True
    for pointer, present in OPTIONAL.items():
        if pointer in parameters and present in parameters and not values[present]:
            values[pointer] = None
    values |= {name: 1 for name in parameters if shape.get(name) == 1 and name not in whole}
    return {name: value for name, value in values.items() if name in parameters}, options


def compile_kernel(case: Case):
    """What the JIT would compile: triton.compiler.CompiledKernel, not loaded."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[case.target]
    function = getattr(__import__(f"csrc_triton.{case.module}", fromlist=[case.kernel]), case.kernel)
    parameters = list(function.arg_names)
    whole = {parameter.name for parameter in function.params if parameter.do_not_specialize}
    constexprs, options = constants(case, parameters, whole)
    shape = {**ARGUMENTS, **next((SHAPES[s] for s in SHAPES if s and case.has(s)), {})}
    operand = {"tf32": "fp32"}.get(case.dtype, case.dtype)
    signature, attributes = {}, {}
    for position, name in enumerate(parameters):
        kind = "constexpr" if name in constexprs else shape[name]
        if isinstance(kind, tuple):
            divisible, kind = False, f"tensordesc<{operand}{[constexprs[side] for side in kind]}>"
        elif isinstance(kind, int):
            divisible, kind = kind % 16 == 0 and name not in whole, "i32"
        else:
            divisible = kind.startswith("*")
        signature[name] = kind.replace("*T", "*" + operand)
        if divisible:
            attributes[position,] = [["tt.divisibility", 16]]
            if target.backend == "hip" and kind.startswith("*") and name not in LARGE:
                attributes[position,].append(["tt.pointer_range", 32])
    source = ASTSource(function, signature, {(parameters.index(k),): v for k, v in constexprs.items()}, attributes)
    return triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp), options=options)


def measure(case: Case) -> dict:
    """What a compiled kernel needs. `spills` in bytes (NVIDIA: of stack and local memory) or registers (AMD).

    `copies` from global to shared memory, on NVIDIA: LDGSTS by threads, UTMALDG of whole tiles through a descriptor.
    """
    compiled = compile_kernel(case)
    found = {
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
        **(amd_usage if TARGETS[case.target].backend == "hip" else nvidia_usage)(compiled),
        "shared": compiled.metadata.shared,
    }
    found["programs"] = occupancy(TARGETS[case.target], found, getattr(compiled.metadata, "tmem_size", 0) or 0)
    return found


def nvidia_usage(compiled) -> dict:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()

        def cuobjdump(*flags: str) -> str:
            command = [tools / "cuobjdump", *flags, cubin.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", cuobjdump("-res-usage")))
        assembly = cuobjdump("-sass")
    instructions = re.findall(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b[\w.]*", assembly)
    spills = spilled(int(usage["STACK"]) + int(usage["LOCAL"]), assembly)
    copies = re.findall(r"\b(?:LDGSTS|UTMALDG)\b", assembly)
    return {
        "registers": int(usage["REG"]),
        "spills": spills,
        "tensor_cores": distinct(instructions),
        "copies": distinct(copies),
    }


def spilled(memory: int, assembly: str) -> int:
    """Bytes of stack and local memory, if any are read back: ptxas 12.9, of Triton 3.6, zeroes a word of stack at the
    loads of descriptors on sm_120 and never looks at it."""
    return memory if re.search(r"\bLDL\b", assembly) else 0


def amd_usage(compiled) -> dict:
    assembly = compiled.asm["amdgcn"]
    usage = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
    # a scalar register without a place goes to a lane of a vector register, not to memory
    spills = usage["vgpr_spill_count"] + usage["private_segment_fixed_size"]
    instructions = re.findall(r"\bv_mfma_\w+", assembly)
    return {"registers": usage["vgpr_count"], "spills": spills, "tensor_cores": distinct(instructions), "copies": ""}


def distinct(instructions: list[str]) -> str:
    return " ".join(sorted(set(instructions)))


def occupancy(target: Target, usage: dict, tensor_memory: int) -> int:
    """Programs that fit one processor at a time: registers, threads, shared memory, tensor memory."""
    warps, registers = usage["warps"], usage["registers"]
    if target.backend == "hip":  # 4 SIMDs of 512 registers a thread, 8 waves each
        by_registers = 4 * min(8, 512 // -(-registers // 8 * 8)) // warps
        by_shared = target.shared // max(1, usage["shared"])
    else:  # 4 quarters of 16384 registers; every program reserves 1 KiB of shared memory
        by_registers = 4 * (16384 // (-(-registers // 8) * 8 * 32)) // warps
        by_shared = target.shared // (usage["shared"] + KIB)
    by_threads = target.threads // (warps * target.warp)
    by_tensor_memory = 512 // tensor_memory if tensor_memory else target.programs
    return min(by_registers, by_shared, by_threads, by_tensor_memory, target.programs)


# ---------------------------------------------------------------------------------------------------------------------
# Judging
# ---------------------------------------------------------------------------------------------------------------------


def needs_tensor_cores(case: Case) -> bool:
    """Products of 16-bit operands always; those of float32 where tf32 is allowed, on NVIDIA."""
    if case.kernel not in PRODUCTS:
        return False
    return case.dtype in ("bf16", "fp16") or (case.dtype == "tf32" and TARGETS[case.target].backend == "cuda")


# Of 16-bit operands: what the instruction is called where a generation has its own, wgmma and tcgen05
WARP_GROUP_PRODUCTS = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}


def complaints(case: Case, found: dict, golden: dict | None) -> list[str]:
    """What is wrong with a compiled kernel. `golden` is None where it is of another Triton version."""
    wrong = []
    if found["spills"]:
        wrong.append(f"{found['spills']} spilled")
    if found["shared"] > TARGETS[case.target].program_shared:
        wrong.append(f"{found['shared']} bytes of shared memory, there are {TARGETS[case.target].program_shared}")
    if needs_tensor_cores(case) and not found["tensor_cores"]:
        wrong.append("no tensor-core instruction")
    if needs_tensor_cores(case) and case.bits == 16:
        wanted = WARP_GROUP_PRODUCTS.get(case.target, "")
        if wanted not in found["tensor_cores"]:
            wrong.append(f"{found['tensor_cores']}, not {wanted}")
    if "persistent" in case.kernel and found["copies"] != "UTMALDG":
        wrong.append(f"{found['copies'] or 'no asynchronous copy'}, not UTMALDG alone: bulk copies of tensors")
    for what in ("registers", "spills", "shared") if golden is not None else ():
        if found[what] > golden[what]:
            wrong.append(f"{found[what]} {what}, recorded were {golden[what]}")
    return [f"{case.name}: {w}" for w in wrong]


def sources() -> dict[str, str]:
    """{module of kernels: a hash of its code, docstrings and comments aside}."""
    found = {}
    for path in sorted(Path(tiles.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
        found[path.stem] = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
    return found


def read_golden() -> dict:
    """{"triton": version, "sources": `sources` of what was compiled, "cases": {name: what `measure` found}}."""
    return json.loads(GOLDEN.read_text())


def write_golden(version: str, compiled: dict[str, str], found: dict[str, dict]) -> None:
    """One case a line, so that a change can be read as a difference."""

    def lines(values: dict) -> str:
        return ",\n".join(f"    {json.dumps(name)}: {json.dumps(values[name])}" for name in sorted(values))

    parts = (
        f'"triton": {json.dumps(version)}',
        f'"sources": {{\n{lines(compiled)}\n  }}',
        f'"cases": {{\n{lines(found)}\n  }}',
    )
    GOLDEN.write_text("{\n  " + ",\n  ".join(parts) + "\n}\n")


COLUMNS = ("warps", "stages", "registers", "spills", "shared", "programs", "tensor_cores")


def row(name: str, found: dict) -> str:
    target, kernel, variant, dtype = name.split(" ")
    values = " ".join(f"{found[c]:>9}" for c in COLUMNS[:-1])
    return f"{target:7} {kernel:28} {variant:36} {dtype:5} {values}  {found['tensor_cores']} {found['copies']}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.aot.compile_all", description=__doc__.split("\n")[0])
    parser.add_argument("--brief", action="store_true", help="what the test compiles")
    parser.add_argument("--all", action="store_true", help="every variant, not the representative ones")
    parser.add_argument("--update", action="store_true", help="record the results in golden.json")
    parser.add_argument("--target", action="append", choices=TARGETS, help="this target only; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args(arguments)
    import triton

    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    chosen = [c for t in options.target or TARGETS for c in cases(t, options.all) if brief(c) or not options.brief]
    golden = read_golden() if GOLDEN.exists() else {"triton": None, "sources": {}, "cases": {}}
    comparable = golden["triton"] == triton.__version__ and not options.update
    print(f"triton {triton.__version__}, golden.json has {golden['triton']}; {len(chosen)} kernels")
    print(f"{'target':7} {'kernel':28} {'variant':36} {'dtype':5} {' '.join(f'{c:>9}' for c in COLUMNS[:-1])}")
    found, wrong = {}, []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # before the workers start: nothing compiled earlier, nothing left
        with ProcessPoolExecutor(options.jobs) as workers:
            for case, result in zip(chosen, workers.map(measure, chosen), strict=True):
                found[case.name] = result
                wrong += complaints(case, result, golden["cases"].get(case.name) if comparable else None)
                print(row(case.name, result), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "cases": found}))
    if options.update:
        known = {case.name for t in TARGETS for case in cases(t, True)}
        kept = {
            name: g for name, g in golden["cases"].items() if name in known and golden["triton"] == triton.__version__
        }
        # of these sources only if nothing was left out
        compiled = golden["sources"] if options.target or options.brief else sources()
        write_golden(triton.__version__, compiled, {**kept, **found})
    print("\n".join(wrong) if wrong else "no spills, no missing tensor cores, nothing grown")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
