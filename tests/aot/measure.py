"""One compilation: the constants and the signature that a call would give a kernel, and what comes out.

Kernels are specialised as Triton's JIT would specialise them for a call at the shape N=8191, H=4096, V=128256: an
argument that is 1 is a constant, pointers and other integers divisible by 16 are marked as such.
"""

import re
import subprocess
import tempfile
from pathlib import Path

from csrc_triton import tiles
from tests.aot.cases import ARGUMENTS, KIB, LARGE, MOMENTS, OPTIONAL, PRODUCTS, SHAPES, TARGETS, USES, Case, Target


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
