"""What there is to compile ahead of time: targets, the arguments of all kernels, and the variants of each kernel."""

from dataclasses import dataclass, replace
from itertools import product

from csrc_triton import tiles

KIB = 1024


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
