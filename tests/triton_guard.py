"""Triton's interpreter, made one whose verdict can be trusted: it computes as a GPU would, and refuses what a GPU would not survive.

    triton_guard.install()
    with triton_guard.check() as seen, triton_guard.poisoned_allocations():
        kernel[grid](...)                            # raises GuardError
    assert seen.load_bytes == 4 * tensor.numel()

`install` replaces arithmetic that the plain interpreter does otherwise than a GPU:

bfloat16            it computes on the bits as if they were integers, and truncates on the way there. Here: in float32, every result
                    rounded to nearest even. Reductions of bfloat16 stay wrong: sum in float32, as kernels should.
tf32                it multiplies float32 in full, so that a kernel which forgot `input_precision="ieee"` looks exact. Here: inputs of
                    such a product are rounded to 10 bits of mantissa.
sizes of `tl.dot`   it takes any. Here: those of the compiler's.

Within `check` every launch is watched as well:

bounds              a pointer remembers the argument that it was made of. Each lane must fall on an element of that very tensor, not
                    merely on mapped memory, a descriptor's on one of the tensor beneath; else nothing is read or written.
masked lanes        those of a load without `other` hold NaN (integers: a number that points nowhere), not a lucky 0.
order               programs run in a shuffled order, never the grid's own; what relies on that shows in the values.
races               an element that one program writes, and another reads or writes in the same launch; two lanes of one store that fall
                    on one element. Atomics are refused: there is no model of them here.

`check` yields the `Seen`: bytes that lanes asked for, masked ones not counted, and the flops of dots.

It is also several times as fast as the plain interpreter, which looks through the whole language at every call of a device function.
"""

import contextlib
import math
import random
from collections import Counter
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
TAG_SHIFT = np.uint64(48)  # user-space addresses are shorter; above them stands the number of the argument, the first 1
ADDRESS = np.uint64((1 << 48) - 1)
SEVERAL = -1  # programs have read an element


class GuardError(AssertionError):
    """What a GPU would not have survived, or would have answered by chance."""


class Seen:
    def __init__(self):
        self.loads, self.stores = Counter(), Counter()  # bytes, by the kernel's name of the tensor
        self.launches, self.dot_flops = Counter(), 0  # launches by kernel

    load_bytes = property(lambda self: self.loads.total())
    store_bytes = property(lambda self: self.stores.total())


def _widened(value):
    """A handle of bfloat16 as one of float32; anything else as it is."""
    narrow = isinstance(value, Handle) and value.dtype.scalar == tl.bfloat16 and value.data.dtype == np.uint16
    return Handle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if narrow else value


def _narrowed(values):
    """A handle of bfloat16: to nearest, ties to even."""
    values = np.asarray(values, np.float32, order="C")
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return Handle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _rounded_to_tf32(value):
    """To nearest, ties away from zero."""
    bits = np.ascontiguousarray(value.data).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)
    return Handle(np.where(np.isfinite(value.data), rounded, value.data), tl.float32)


def _in_float32(name):
    """The interpreter's elementwise operation, by way of float32 if an argument is bfloat16."""
    original = getattr(interpreter.InterpreterBuilder, name, None)

    def operation(self, *args):
        wide = [_widened(arg) for arg in args]
        result = original(self, *wide)
        if all(a is b for a, b in zip(args, wide, strict=True)):
            return result
        return Handle(result.data, tl.int1) if result.data.dtype == np.bool_ else _narrowed(result.data)

    return operation


class Argument:
    """A tensor that a kernel was given."""

    def __init__(self, name, tensor):
        self.name, self.shape, self.strides, self.itemsize = name, tuple(tensor.shape), tensor.stride(), tensor.element_size()
        self.low, self.storage, self.shadow = tensor.data_ptr(), tensor.untyped_storage().data_ptr(), None
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        self.high = self.low + (last + 1) * self.itemsize * (tensor.numel() > 0)

    def indices(self, offsets):
        """(index on every axis, whether it is of an element) for offsets in elements from the first."""
        found, rest, inside = [0] * len(self.shape), offsets, (offsets >= 0) & (self.high > self.low)
        # The longest stride first: what remains of an offset is the business of the shorter ones.
        for axis in sorted(range(len(self.shape)), key=lambda axis: -self.strides[axis]):
            if self.shape[axis] > 1 and self.strides[axis]:
                found[axis], rest = np.divmod(rest, self.strides[axis])
                inside &= found[axis] < self.shape[axis]
        return found, inside & (rest == 0)

    def element(self, address):
        return f"{self.name}[{', '.join(map(str, self.indices(np.array((address - self.low) // self.itemsize))[0]))}]"

    def outside(self, addresses, width):
        """Offset of the first lane that is not on an element; None: all are."""
        offsets, beyond = np.divmod(addresses - self.low, self.itemsize)
        inside = self.indices(offsets)[1] & (beyond + width <= self.itemsize)
        return None if inside.all() else int(offsets[~inside][0])


class Shadow:
    """Who wrote and who read each unit of some memory during a launch: 0 nobody, else the program's number from 1."""

    def __init__(self, arguments):
        self.low, self.unit = min(a.low for a in arguments), min(a.itemsize for a in arguments)
        units = -(-(max(a.high for a in arguments) - self.low) // self.unit)
        self.writer, self.reader = np.zeros(units, np.int32), np.zeros(units, np.int32)

    def race(self, kind, addresses, width, me):
        """(what was done to an element before, its address, the number of who did it); None: no race, and the access is noted."""
        units = ((addresses - self.low)[:, None] + np.arange(0, width, self.unit)).ravel() // self.unit
        writer, reader = self.writer[units], self.reader[units]
        for what, whom in (("written by", writer), ("read by", reader))[: 1 + (kind == "store")]:
            other = (whom != 0) & (whom != me)
            if other.any():
                return what, self.low + int(units[other][0]) * self.unit, int(whom[other][0])
        if kind == "load":
            self.reader[units] = np.where((reader == 0) | (reader == me), me, SEVERAL)
            return None
        found, times = np.unique(units, return_counts=True)
        self.writer[units] = me
        return ("stored by another lane of", self.low + int(found[times > 1][0]) * self.unit, me) if (times > 1).any() else None


class Check:
    """What `check` was asked for, and the launch under way."""

    def __init__(self, order, races, seed):
        self.order, self.races, self.random, self.seen = order, races, random.Random(seed), Seen()

    def begin(self, kernel, values):
        """Numbers the tensors among the values by name, and lays shadows over their memory, one over what may overlap."""
        self.kernel, self.arguments, self.tags = kernel, [], {}
        self.seen.launches[kernel] += 1
        for name, value in values.items():
            value = value.base if hasattr(value, "block_shape") else value  # a descriptor's tensor
            if hasattr(value, "data_ptr"):
                self.arguments.append(Argument(name, value))
                self.tags[id(value)] = len(self.arguments)
        for argument in self.arguments if self.races else ():
            sharing = [other for other in self.arguments if other.storage == argument.storage]
            argument.shadow = next((other.shadow for other in sharing if other.shadow), None) or Shadow(sharing)

    def lay_out(self, grid):
        self.grid, self.sequence = grid, list(range(math.prod(grid)))
        while self.order == "shuffle" and len(self.sequence) > 1 and self.sequence[0] == 0:
            self.random.shuffle(self.sequence)

    def place(self, number):
        return f"program ({', '.join(map(str, np.unravel_index(number - 1, self.grid)))}) of {self.kernel}" if number > 0 else "several"

    def access(self, kind, pointers, mask):
        """The pointers without their tags, once every lane that is not masked has been found good."""
        data = np.asarray(pointers.data)
        lanes = data[np.broadcast_to(np.asarray(mask, bool), data.shape)]
        width, here = max(1, pointers.get_element_ty().primitive_bitwidth // 8), self.place(self.program + 1)
        for tag in np.unique(lanes >> TAG_SHIFT):
            if not 1 <= tag <= len(self.arguments):
                raise GuardError(f"{here}: {kind} through a pointer that leads far from every argument")
            argument, addresses = self.arguments[int(tag) - 1], (lanes[lanes >> TAG_SHIFT == tag] & ADDRESS).astype(np.int64)
            outside = argument.outside(addresses, width)
            if outside is not None:
                raise GuardError(f"{here}: {kind} out of bounds at {argument.name}[element {outside}], whose shape is {argument.shape}")
            if self.races and (race := argument.shadow.race(kind, addresses, width, self.program + 1)):
                what, address, other = race
                raise GuardError(f"{here}: race, {kind} of {argument.element(address)}, {what} {self.place(other)}")
            (self.seen.loads if kind == "load" else self.seen.stores)[argument.name] += addresses.size * width
        return Handle(data & ADDRESS, pointers.dtype)


_active: Check | None = None
_convert = getattr(interpreter, "_implicit_cvt", None)
_patch = getattr(interpreter, "_patch_lang", None)


_original_numpy_dtype = interpreter._get_np_dtype
_numpy_dtypes = {}


def _numpy_dtype(type):
    """`_get_np_dtype`, which makes a table of all dtypes at every call."""
    name = type.scalar.name
    if name not in _numpy_dtypes:
        _numpy_dtypes[name] = _original_numpy_dtype(type)
    return _numpy_dtypes[name]


OVERFLOWING = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _fits(a, b, operation):
    """`binary_op_sanitize_overflow_impl`, which interprets ten operations to say whether one of integers stays within its type."""
    scalar = a.type.scalar
    if scalar.int_bitwidth < 64 and interpreter.interpreter_builder.options.sanitize_overflow:
        wide = OVERFLOWING[operation.__name__](a.handle.data.astype(np.int64), b.handle.data.astype(np.int64))
        inside = (wide >= scalar.get_int_min_value()) & (wide <= scalar.get_int_max_value())
        assert inside.all(), f"int{scalar.int_bitwidth} overflow detected for operation {operation.__name__}"


def _poison(element, shape):
    data = _numpy_dtype(element)
    if element.is_floating():
        value = math.nan if data.kind == "f" else 0x7FC0 if element == tl.bfloat16 else 0x7F  # those held as bits
    else:
        value = data.kind == "b" or np.iinfo(data).max // 3
    return Handle(np.full(shape, value, data), element)


class GuardedBuilder(interpreter.InterpreterBuilder):
    binary_op, unary_op, ternary_op = map(_in_float32, ("binary_op", "unary_op", "ternary_op"))
    create_fma, create_rsqrt = map(_in_float32, ("create_fma", "create_rsqrt"))

    def cast_impl(self, source, target):
        if source.dtype.scalar == target.scalar == tl.bfloat16:
            return source
        source = _widened(source)
        return _narrowed(source.data) if target.scalar == tl.bfloat16 else super().cast_impl(source, target)

    def create_dot(self, a, b, d, precision, *rest):
        if a.dtype.scalar == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
            a, b = _rounded_to_tf32(a), _rounded_to_tf32(b)
        if _active is not None:
            _active.seen.dot_flops += 2 * d.data.size * a.data.shape[-1]
        return super().create_dot(_widened(a), _widened(b), d, precision, *rest)

    def create_masked_load(self, pointers, mask, other, *rest, **options):
        if _active is not None:
            pointers = _active.access("load", pointers, mask.data)
            if other is None and pointers.data.size > 1:  # of a single lane, triton takes other=0 for none
                other = _poison(pointers.get_element_ty(), pointers.data.shape)
        return super().create_masked_load(pointers, mask, other, *rest, **options)

    def create_masked_store(self, pointers, value, mask, *rest, **options):
        if _active is not None:
            pointers = _active.access("store", pointers, mask.data)
        return super().create_masked_store(pointers, value, mask, *rest, **options)

    def create_atomic_rmw(self, *args):
        raise GuardError("an atomic")

    create_atomic_cas = create_atomic_rmw

    def set_grid_dim(self, *grid):
        super().set_grid_dim(*grid)
        if _active is not None:
            _active.lay_out(grid)

    def set_grid_idx(self, *index):
        if _active is not None:
            _active.program = _active.sequence[np.ravel_multi_index(index, _active.grid)]
            index = tuple(map(int, np.unravel_index(_active.program, _active.grid)))
        super().set_grid_idx(*index)


class GuardedExecutor(interpreter.GridExecutor):
    def __call__(self, *args, **kwargs):
        if _active is None:
            return super().__call__(*args, **kwargs)
        try:
            with np.errstate(all="ignore"):  # as on a GPU
                return super().__call__(*args, **kwargs)
        except interpreter.InterpreterError as error:  # it quotes what it was raised from
            cause = error
            while cause is not None and not isinstance(cause, GuardError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None

    def _init_args_hst(self, args, kwargs):
        args, kwargs = super()._init_args_hst(args, kwargs)
        if _active is not None:
            _active.begin(self.fn.__name__, dict(zip(self.arg_names, args, strict=False)) | kwargs)
        return args, kwargs


def _tagged(argument):
    """An argument as the interpreter converts it; the pointer to a tensor, a descriptor's too, with its tag."""
    value = _convert(argument)
    if _active is not None and hasattr(argument, "data_ptr"):
        value.handle.data = value.handle.data + (np.uint64(_active.tags[id(argument)]) << TAG_SHIFT)
    return value


_original_tensor = tl.tensor.__init__
_shapes = {}  # (number of elements, shape) of a tensor, by its type's name


def _tensor(self, handle, type):
    """`tl.tensor.__init__`, which makes a type for every shape it is given; nothing changes a shape."""
    if type.name not in _shapes:
        _original_tensor(self, handle, type)
        _shapes[type.name] = self.numel, self.shape
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _shapes[type.name]


class _Scope(interpreter._LangPatchScope):
    """The language's names as the interpreter patches them, until `restore`. They are found once, and set from memory after that."""

    found: ClassVar = []  # (owner, name, value) of every change
    entered = False

    def __init__(self):
        super().__init__()
        if not self.found:
            made = _patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))  # what kernels see, and what the language's own do
            self.found += [(owner, name, vars(owner)[name]) for owner, name, _ in made._changes]
            made.restore()
            self.found.append((tl.tensor, "__init__", _tensor))
        for change in self.found:
            self.set_attr(*change)
        _Scope.entered = True

    def restore(self):
        super().restore()
        _Scope.entered = False


def _patched(function):
    """`_patch_lang`. What a launch has patched is patched for the device functions that it calls; these never restore anything."""
    return None if _Scope.entered else _Scope()


def install(arch: int = 90):
    """For the rest of the process; `arch` is the compute capability whose compiler says how small a dot may be."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 must be in the environment before triton is imported")
    builder = interpreter.interpreter_builder
    builder.codegen_fns["min_dot_size"] = min_dot_size(GPUTarget("cuda", arch, 32))
    replaced = [(guarded.__base__, name) for guarded in (GuardedBuilder, GuardedExecutor) for name in vars(guarded) if name[:2] != "__"]
    replaced += [(interpreter, name) for name in ("_implicit_cvt", "_patch_lang", "_get_np_dtype", "_LangPatchScope")]
    replaced.append((interpreter.TritonSemantic, "binary_op_sanitize_overflow_impl"))
    missing = [f"{owner.__name__}.{name}" for owner, name in replaced if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(f"triton {triton.__version__} has no {', '.join(missing)}; the guard has to replace what took its place")
    interpreter.InterpreterBuilder.get_bf16 = lambda self, value: _narrowed([value])  # which older ones lack
    builder.__class__, interpreter.GridExecutor, interpreter._implicit_cvt = GuardedBuilder, GuardedExecutor, _tagged
    interpreter._patch_lang, interpreter._get_np_dtype = _patched, _numpy_dtype
    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = _fits


@contextlib.contextmanager
def check(order="shuffle", races=True, seed=0):
    """Watches every launch, of programs in this order: "shuffle" or "grid". Yields the Seen."""
    global _active
    assert order in ("shuffle", "grid") and isinstance(interpreter.interpreter_builder, GuardedBuilder), "install() first"
    before, _active = _active, Check(order, races, seed)
    try:
        yield _active.seen
    finally:
        _active = before


@contextlib.contextmanager
def poisoned_allocations():
    """torch.empty and its kin are full of NaN (integers: their largest), so that what no kernel has written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
