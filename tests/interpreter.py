"""Triton's interpreter, made to round and to sum as every GPU does, to find accesses out of bounds, and to spend its
time on the kernels.

It runs kernels on the CPU when TRITON_INTERPRET=1 is set before they are decorated. What is corrected here belongs to
the interpreter alone: with it a test would measure the interpreter instead of the kernels.
"""

import inspect

import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests import bounds


def adjust() -> None:
    """Call before the first launch; further calls have no effect."""
    if hasattr(interpreter, "adjusted"):
        return
    interpreter.adjusted = True
    _round_bfloat16_to_nearest()
    _sum_products_in_one_order()
    _remember_what_to_patch()
    bounds.watch()
    _launch_with_room_on_the_stack()


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
