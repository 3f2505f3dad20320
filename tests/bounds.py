"""Where kernels may read and write, held in Triton's interpreter: inside of the tensor that a pointer was made from.

Every tensor argument of a launch has a number, which stands in the 16 upper bits of its pointer: addresses leave them
free, and sums with offsets keep them. So each access says whose it is, and one that lands inside of another tensor, or
of what the caller keeps between the rows of a view, is found like one beyond all memory. Masked elements are free.
"""

import collections
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
from torch import Tensor
from triton.runtime import interpreter

ADDRESS = numpy.uint64(2**48 - 1)
# name of the builder's method -> (what it does, positions of the pointers and of the mask among its arguments)
ACCESSES = {
    "create_masked_load": ("load", 0, 1),
    "create_masked_store": ("store", 0, 2),
    "create_atomic_rmw": ("atomic", 1, 3),
    "create_atomic_cas": ("atomic", 0, None),
}

launches: collections.Counter[str] = collections.Counter()  # of each kernel, all of them checked
_current: list["Launch"] = []  # the launch under way; what was noted of it is looked at when it ends
_watchers: list[list["Launch"]] = []


class OutOfBoundsError(AssertionError):
    """An access outside of the argument that its pointer was made from."""


class RaceError(AssertionError):
    """An address that one program of a launch stores to and another one loads or stores, in no order that holds."""


class Argument:
    """The elements of a tensor argument, relative to its first."""

    def __init__(self, name: str, tensor: Tensor, number: int):
        self.name, self.shape, self.strides, self.dtype = name, tuple(tensor.shape), tensor.stride(), tensor.dtype
        self.base = tensor.data_ptr() + (number << 48)
        self.itemsize = tensor.itemsize
        steps = sorted(((stride, n) for n, stride in zip(self.shape, self.strides, strict=True) if n > 1), reverse=True)
        self.span = self.itemsize * (1 + sum((n - 1) * stride for stride, n in steps)) if tensor.numel() else 0
        inner = [1 + sum((n - 1) * stride for stride, n in steps[i + 1 :]) for i in range(len(steps))]
        apart = all(stride >= reach for (stride, _), reach in zip(steps, inner, strict=True))
        # where rows overlap (an expanded tensor) nothing lies between them
        self.steps = steps if apart and self.span > tensor.numel() * self.itemsize else []

    def outside(self, offsets: numpy.ndarray, width: int) -> numpy.ndarray:
        """Which accesses of so many bytes at signed offsets in bytes are not of an element."""
        wrong = (offsets < 0) | (offsets + width > self.span)
        element, rest = numpy.divmod(offsets, self.itemsize)
        for stride, n in self.steps:
            index, element = numpy.divmod(element, stride)
            wrong |= index >= n
        return wrong | ((element != 0) | (rest != 0) if self.steps else False)

    def __str__(self) -> str:
        return f"{self.name} {self.shape} {str(self.dtype).removeprefix('torch.')} with strides {self.strides}"


class Launch:
    """The arguments of a launch and, while races are watched for, the addresses that each program went to."""

    def __init__(self, kernel: str):
        self.kernel = kernel
        self.names: dict[int, str] = {}  # id of a tensor -> argument
        self.arguments: list[Argument] = []
        self.error: AssertionError | None = None
        self.visits: list[tuple[str, int, numpy.ndarray]] = []  # (load | store | atomic, program, addresses)

    def take(self, tensor: Tensor) -> Argument:
        name = self.names.get(id(tensor), "a tensor")
        self.arguments.append(Argument(name, tensor, len(self.arguments) + 1))
        return self.arguments[-1]

    def check(self, kind: str, pointers: numpy.ndarray, width: int) -> None:
        """Pointers that are not masked, at least one."""
        first, last = int(pointers.min()), int(pointers.max())
        number = first >> 48
        if number != last >> 48:  # of several arguments
            for one in numpy.unique(pointers >> 48):
                self.check(kind, pointers[pointers >> 48 == one], width)
            return
        if not 0 < number <= len(self.arguments):
            self.fail(f"{kind} at {first:#x}, which is no address inside of a tensor argument")
        argument = self.arguments[number - 1]
        inside = first >= argument.base and last + width <= argument.base + argument.span
        if inside and not argument.steps:
            return
        offsets = (pointers - numpy.uint64(argument.base)).astype(numpy.int64)
        wrong = offsets[argument.outside(offsets, width)]
        if wrong.size:
            worst = wrong[numpy.argmax(numpy.maximum(-wrong, wrong + width - argument.span))]
            past, before = int(worst) + width - argument.span, -int(worst)
            where = f"{past} bytes past its end" if past > 0 else f"{before} bytes before its start"
            if past <= 0 and before <= 0:
                where = f"{-before} bytes from its start, between its elements"
            self.fail(f"{kind} of {argument}: {wrong.size} of {offsets.size} elements are outside, {where}")

    def fail(self, message: str) -> None:
        self.error = OutOfBoundsError(f"{self.kernel}, program {interpreter.interpreter_builder.grid_idx}: {message}")
        raise self.error

    def check_races(self) -> None:
        """No address that a program stores to is another one's too."""
        stores = [visit for visit in self.visits if visit[0] == "store"]
        if not stores:
            return
        address = numpy.concatenate([where for _, _, where in stores])
        program = numpy.concatenate([numpy.full(where.size, who) for _, who, where in stores])
        stored, index = numpy.unique(address, return_index=True)
        owner = program[index]
        for kind, who, where in self.visits:
            at = numpy.minimum(numpy.searchsorted(stored, where), stored.size - 1)
            shared = (stored[at] == where) & (owner[at] != who)
            if shared.any():
                others = sorted({int(n) for n in owner[at[shared]]})
                raise RaceError(f"{self.kernel}: {kind} of program {who} at {int(shared.sum())} addresses that "
                           f"programs {others[:8]} store to")  # fmt: skip


def watch() -> None:
    """Check every launch from now on. Once, before the first one."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    for name, (kind, pointers, mask) in ACCESSES.items():
        setattr(builder, name, _checking(getattr(builder, name), kind, pointers, mask))
    executor._init_args_hst = _naming(executor._init_args_hst)
    executor.__call__ = _launching(executor.__call__)
    interpreter._implicit_cvt = _numbering(interpreter._implicit_cvt)


@contextmanager
def watching_for_races() -> Iterator[list[Launch]]:
    """The launches made meanwhile: in each of them a store to an address is one program's alone."""
    _watchers.append([])
    try:
        yield _watchers[-1]
    finally:
        _watchers.pop()


def _launching(run):
    def launch(self, *args, **kwargs):
        _current.append(Launch(self.fn.__name__))
        try:
            result = run(self, *args, **kwargs)
        except interpreter.InterpreterError:
            if _current[-1].error is None:
                raise
            raise _current[-1].error from None
        finally:
            done = _current.pop()
        launches[done.kernel] += 1
        if _watchers:
            done.check_races()
            done.visits.clear()
            _watchers[-1].append(done)
        return result

    return launch


def _naming(to_host):
    """What the interpreter really gets are copies of the arguments, on the host."""

    def wrapper(self, args, kwargs):
        copies, named = to_host(self, args, kwargs)
        for name, value in (*zip(self.arg_names, copies, strict=False), *named.items()):
            _current[-1].names[id(getattr(value, "base", value))] = name
        return copies, named

    return wrapper


def _numbering(convert):
    def wrapper(value):
        converted = convert(value)
        if hasattr(value, "data_ptr"):
            converted.handle.data[:] = _current[-1].take(value).base
        return converted

    return wrapper


def _checking(access, kind: str, pointer_at: int, mask_at: int | None):
    @functools.wraps(access)
    def wrapper(self, *args, **kwargs):
        pointers = args[pointer_at]
        where = pointers.data
        mask = True if mask_at is None else numpy.asarray(args[mask_at].data)
        if not numpy.all(mask):
            where = where[mask]
        if where.size:
            launch = _current[-1]
            launch.check(kind, where, math.ceil(pointers.get_element_ty().primitive_bitwidth / 8))
            if _watchers:
                program = numpy.ravel_multi_index(self.grid_idx, self.grid_dim)
                launch.visits.append((kind, int(program), (where & ADDRESS).ravel()))
        plain = interpreter.TensorHandle(pointers.data & ADDRESS, pointers.dtype)
        return access(self, *args[:pointer_at], plain, *args[pointer_at + 1 :], **kwargs)

    return wrapper
