"""Triton's interpreter, made to round and to sum as every GPU does, to find accesses out of bounds, and to spend its
time on the kernels.

It runs kernels on the CPU when TRITON_INTERPRET=1 is set before they are decorated. What is corrected here belongs to
the interpreter alone: with it a test would measure the interpreter instead of the kernels.
"""

import inspect
import threading

import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests import bounds


def adjust() -> None:
    """Call before the first launch; further calls have no effect."""
    if hasattr(interpreter, "adjusted"):
        return
    _round_bfloat16_to_nearest()
    _sum_products_in_one_order()
    _remember_what_to_patch()
    _remember_dtypes()
    _remember_shapes()
    _check_overflow()
    bounds.watch()
    _launch_with_room_on_the_stack()
    _patch_once_a_launch()
    interpreter.adjusted = True


def _round_bfloat16_to_nearest() -> None:
    """float32 is cut off to bfloat16, at twice the error of rounding it."""
    convert = interpreter._convert_float

    def rounding(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        rounded = torch.from_numpy(numpy.ascontiguousarray(data)).bfloat16()
        return rounded.view(torch.int16).numpy().view(numpy.uint16)

    interpreter._convert_float = rounding


def _sum_products_in_one_order() -> None:
    """tl.dot is a vendor's product, which gives a row other bits at another place of its tile.

    So does einsum where an operand is a transposed view.
    """

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = numpy.ascontiguousarray(a.data), numpy.ascontiguousarray(b.data)
        product = numpy.einsum("ik,kj->ij", a, b, dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _remember_what_to_patch() -> None:
    """Half of the time goes into finding the builtins of triton.language anew for every call of a device function."""
    builtins = {}

    def patch_builtin(package, builder, scope):
        if package not in builtins:
            members = inspect.getmembers(package)
            builtins[package] = [name for name, member in members if tl.core.is_builtin(member)]
        for name in builtins[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


def _patch_once_a_launch() -> None:
    """Every call of a device function patches triton.language again, which its launch has done already."""
    run, patch, this = interpreter.GridExecutor.__call__, interpreter._patch_lang, threading.local()

    def launch(self, *args, **kwargs):
        this.patched = None
        try:
            return run(self, *args, **kwargs)
        finally:
            this.patched = None

    def patch_lang(fn):
        languages = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if languages == getattr(this, "patched", None):
            return interpreter._LangPatchScope()
        this.patched = languages
        return patch(fn)

    interpreter.GridExecutor.__call__ = launch
    interpreter._patch_lang = patch_lang


def _remember_dtypes() -> None:
    """The table of NumPy's dtypes is made anew for every value."""
    find, known = interpreter._get_np_dtype, {}

    def np_dtype(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    interpreter._get_np_dtype = np_dtype


def _remember_shapes() -> None:
    """What a value has from its type, and a type of blocks from its element and shape, is made anew every time."""
    make_tensor, make_type, known, types = tl.tensor.__init__, tl.block_type.__init__, {}, {}

    def tensor(self, handle, type):
        rest = known.get(type.name)
        if rest is None:
            make_tensor(self, handle, type)
            known[type.name] = {name: value for name, value in vars(self).items() if name in ("shape", "numel")}
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            vars(self).update(rest)

    def block_type(self, element_ty, shape):
        key = element_ty.name, *shape
        if any(type(size) is not int for size in shape):
            make_type(self, element_ty, shape)
        elif key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        else:
            vars(self).update(types[key])

    tl.tensor.__init__ = tensor
    tl.block_type.__init__ = block_type


def _check_overflow() -> None:
    """The interpreter computes whether an operation leaves int32, by a dozen others, and ignores the answer."""
    semantic = type(interpreter.interpreter_semantic)
    operations = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply}
    limits = numpy.iinfo(numpy.int32)

    def check(self, lhs, rhs, binary_op):
        a, b = lhs.handle.data, rhs.handle.data
        if a.dtype == b.dtype == numpy.int32:
            value, name = operations[binary_op.__name__](a, b, dtype=numpy.int64), binary_op.__name__
            assert limits.min <= value.min() and value.max() <= limits.max, f"int32 overflow in {name}"

    semantic.binary_op_sanitize_overflow_impl = check


def _launch_with_room_on_the_stack() -> None:
    """CPython maps its stack in pieces of 16 KiB: a loop of calls across an edge maps and unmaps one for every call.

    A frame as wide as this one, of variables that are never set, begins a piece with room for all calls below it.
    """
    scope = {}
    variables = " = ".join(f"x{i}" for i in range(12_000))
    exec(f"def call(function, *args, **kwargs):\n    if not function: {variables} = 0\n"
         "    return function(*args, **kwargs)", scope)  # fmt: skip
    run = interpreter.GridExecutor.__call__

    def launch(self, *args, **kwargs):
        return scope["call"](run, self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = launch
