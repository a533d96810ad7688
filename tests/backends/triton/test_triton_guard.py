"""Each check of `triton_guard` catches its bug, in a kernel made for it; and lets the same kernel without the bug pass."""

import re

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
guard = pytest.importorskip("triton_guard")
TensorDescriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="triton compiles here, for a GPU")


@pytest.fixture(autouse=True)
def installed():
    if triton.knobs.runtime.interpret:
        guard.install()


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def caught(message, kernel, grid, *args, **options):
    with guard.check(), pytest.raises(guard.GuardError, match=re.escape(message)):
        kernel[grid](*args, **options)


@triton.jit
def cast_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def arithmetic_kernel(x, y, out, OPERATION: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    if OPERATION == "add":
        result = a + b
    elif OPERATION == "subtract":
        result = a - b
    elif OPERATION == "multiply":
        result = a * b
    elif OPERATION == "maximum":
        result = tl.maximum(a, b)
    elif OPERATION == "negate":
        result = -a
    else:
        result = tl.where(a < b, a, b)
    tl.store(out + at, result)


@triton.jit
def dot_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    row, column, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + row[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + column[None, :])
    tl.store(out + row[:, None] * N + column[None, :], tl.dot(x, y, input_precision=PRECISION))


@triton.jit
def copy_kernel(x, out, n_loaded, n_stored, x_step, out_step, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    value = tl.load(x + at * x_step, mask=at < n_loaded, other=0.0)
    tl.store(out + at * out_step, value, mask=at < n_stored)


@triton.jit
def rows_kernel(x, out, stride, width, R: tl.constexpr, C: tl.constexpr):
    row, column = tl.arange(0, R), tl.arange(0, C)
    value = tl.load(x + row[:, None] * stride + column[None, :], mask=(column < width)[None, :], other=0.0)
    tl.store(out + row[:, None] * C + column[None, :], value)


@triton.jit
def unfilled_kernel(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at, mask=at < n))


@triton.jit
def lookup_kernel(x, places, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + tl.load(places + at, mask=at < n)))


@triton.jit
def same_place_kernel(out, STEP: tl.constexpr):
    tl.store(out + tl.program_id(0) * STEP, 1.0)


@triton.jit
def overwrite_kernel(x, out, N: tl.constexpr, SHIFT: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    value = tl.load(x + (at + SHIFT) % (N * tl.num_programs(0)))
    tl.store(out + at, value + 1.0)


@triton.jit
def chain_kernel(out):
    at = tl.program_id(0)
    before = tl.load(out + at - 1, mask=at > 0, other=0.0)
    tl.store(out + at, before + 1.0)


@triton.jit
def folded_kernel(out, N: tl.constexpr, STEP: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at // STEP, at.to(tl.float32))


@triton.jit
def atomic_kernel(out):
    tl.atomic_add(out, 1.0)


@triton.jit
def descriptor_kernel(x, out, R: tl.constexpr, C: tl.constexpr):
    at = tl.program_id(0) * R
    out.store([at, 0], x.load([at, 0]))


@triton.jit
def own_descriptor_kernel(x, out, rows, R: tl.constexpr, C: tl.constexpr):
    tiles = tl.make_tensor_descriptor(x, [rows, C], [C, 1], [R, C])
    tl.store(out + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :], tiles.load([0, 0]))


@pytest.mark.parametrize("source", [torch.float32, torch.float16])
def test_casts_to_bfloat16_round_to_nearest_even(source):
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-10, -1 - 2**-8, 0.0, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([ties, normal(56) * 100]).to(source)
    out = torch.empty(64, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, N=64)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(64)
    cast_kernel[(1,)](out, back, N=64)
    torch.testing.assert_close(back, out.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "operation, expected",
    [
        ("add", torch.add), ("subtract", torch.sub), ("multiply", torch.mul), ("maximum", torch.maximum), ("smaller", torch.minimum),
        ("negate", lambda a, b: -a),
    ],
)  # fmt: skip
def test_bfloat16_arithmetic_is_torchs(operation, expected):
    x, y = normal(64, dtype=torch.bfloat16), normal(64, dtype=torch.bfloat16, seed=1)
    out = torch.empty(64, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, out, OPERATION=operation, N=64)
    assert torch.equal(out, expected(x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_is_that_of_the_values(dtype):
    a, b, out = normal(16, 32, dtype=dtype), normal(32, 16, dtype=dtype, seed=1), torch.empty(16, 16)
    with guard.check() as seen:
        dot_kernel[(1,)](a, b, out, M=16, N=16, K=32, PRECISION="ieee")
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
    assert seen.dot_flops == 2 * 16 * 16 * 32


@pytest.mark.parametrize("precision, least, most", [("ieee", 0, 1e-6), ("tf32", 1e-5, 2e-3)])
def test_rounding_of_tf32_shows(precision, least, most):
    a, b, out = normal(16, 32), normal(32, 16, seed=1), torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, M=16, N=16, K=32, PRECISION=precision)
    truth = a.double() @ b.double()
    assert least <= (out - truth).abs().max() / truth.abs().max() <= most


def test_tf32_keeps_ten_bits_of_mantissa():
    a, b = torch.zeros(16, 16), torch.eye(16)
    a[0, :4] = torch.tensor([1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -1 - 2**-11])
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, M=16, N=16, K=16, PRECISION="tf32")
    assert out[0, :4].tolist() == [1 + 2**-10, 1 + 2**-10, 1.0, -1 - 2**-10]


def test_dot_shallower_than_the_compiler_takes_is_refused():
    a, b, out = normal(16, 8).bfloat16(), normal(8, 16).bfloat16(), torch.empty(16, 16)
    with pytest.raises(Exception, match="K >= 16"):
        dot_kernel[(1,)](a, b, out, M=16, N=16, K=8, PRECISION="ieee")


def test_load_beyond_a_tensor_is_caught_and_named():
    x, out = torch.zeros(20), torch.zeros(32)
    with guard.check():
        copy_kernel[(2,)](x, out, 20, 32, 1, 1, N=16)
    caught("program (1, 0, 0) of copy_kernel: load out of bounds at x[element 20], whose shape is (20,)",
           copy_kernel, (2,), x, out, 21, 32, 1, 1, N=16)  # fmt: skip
    caught("load out of bounds at x[element -1]", copy_kernel, (1,), x, out, 2, 32, -1, 1, N=16)


def test_store_beyond_a_tensor_is_caught_before_it_happens():
    memory = torch.zeros(48)
    x, out = torch.ones(32), memory[:20]
    caught("program (1, 0, 0) of copy_kernel: store out of bounds at out[element 20], whose shape is (20,)",
           copy_kernel, (2,), x, out, 32, 32, 1, 1, N=16)  # fmt: skip
    assert (memory[20:] == 0).all()


def test_pointer_is_held_to_its_own_tensor_and_not_its_neighbour():
    memory = torch.zeros(64)
    x, out = memory[:16], memory[16:]  # what lies beyond x is out
    caught("load out of bounds at x[element 16], whose shape is (16,)", copy_kernel, (2,), x, out, 32, 0, 1, 1, N=16)


def test_gaps_between_strided_rows_are_out_of_bounds():
    x, out = torch.zeros(4, 12)[:, :6], torch.zeros(4, 8)
    with guard.check():
        rows_kernel[(1,)](x, out, 12, 6, R=4, C=8)
    caught("load out of bounds at x[element 6], whose shape is (4, 6)", rows_kernel, (1,), x, out, 12, 7, R=4, C=8)
    with guard.check():  # a transposed matrix has no gaps
        rows_kernel[(1,)](torch.zeros(8, 4).T, out, 4, 4, R=8, C=4)


def test_masked_lanes_without_other_are_nan():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = torch.zeros(16, dtype=dtype)
        with guard.check():
            unfilled_kernel[(1,)](torch.ones(10, dtype=dtype), out, 10, N=16)
        assert (out[:10] == 1).all() and out[10:].isnan().all()


def test_masked_integers_without_other_point_nowhere():
    for dtype in (torch.int32, torch.int64):
        places, x, out = torch.zeros(10, dtype=dtype), torch.zeros(16), torch.zeros(16)
        caught("lookup_kernel: load", lookup_kernel, (1,), x, places, out, 10, N=16)


def test_two_programs_that_write_one_element_are_caught():
    with guard.check():
        same_place_kernel[(4,)](torch.zeros(4), STEP=1)
    caught("race, store of out[0], written by program", same_place_kernel, (4,), torch.zeros(4), STEP=0)
    with guard.check(races=False):
        same_place_kernel[(4,)](torch.zeros(4), STEP=0)


@pytest.mark.parametrize("order", ["shuffle", "grid"])
def test_program_that_reads_what_another_writes_is_caught_in_every_order(order):
    x = torch.zeros(32)
    with guard.check(order=order):
        overwrite_kernel[(2,)](x, x, N=16, SHIFT=0)
        overwrite_kernel[(2,)](x, torch.zeros(32), N=16, SHIFT=1)
    for other in (x, x[:]):  # the same memory under two names
        with guard.check(order=order), pytest.raises(guard.GuardError, match=r"race, .* of (x|out)\[\d+\], (read|written) by program"):
            overwrite_kernel[(2,)](x, other, N=16, SHIFT=1)


def test_two_lanes_that_write_one_element_are_caught():
    with guard.check():
        folded_kernel[(1,)](torch.zeros(16), N=16, STEP=1)
    caught("race, store of out[0], stored by another lane of program", folded_kernel, (1,), torch.zeros(16), N=16, STEP=2)


def test_reliance_on_the_order_of_programs_shows():
    inorder, shuffled = torch.zeros(8), torch.zeros(8)
    with guard.check(order="grid", races=False):
        chain_kernel[(8,)](inorder)
    assert inorder.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    with guard.check(races=False):
        chain_kernel[(8,)](shuffled)
    assert not torch.equal(shuffled, inorder)


@pytest.mark.parametrize("programs", [1, 2, 3, 4])
def test_shuffled_programs_each_run_once(programs):
    out = torch.zeros(32)
    with guard.check() as seen:
        copy_kernel[(programs,)](torch.ones(32), out, 32, 32, 1, 1, N=8)
    assert (out[: 8 * programs] == 1).all() and (out[8 * programs :] == 0).all() and seen.launches == {"copy_kernel": 1}
    assert seen.stores == {"out": 32 * programs}


def test_atomics_are_refused():
    caught("atomic", atomic_kernel, (2,), torch.zeros(1))


def test_descriptors_pad_beyond_their_shape_and_are_held_to_the_tensor_beneath():
    x, out = normal(20, 16), torch.zeros(32, 16)
    with guard.check() as seen:
        descriptor_kernel[(2,)](TensorDescriptor.from_tensor(x, [16, 16]), TensorDescriptor.from_tensor(out, [16, 16]), R=16, C=16)
    assert torch.equal(out[:20], x) and (out[20:] == 0).all()
    assert seen.loads == {"x": 20 * 16 * 4} and seen.stores == {"out": 32 * 16 * 4}
    claimed = TensorDescriptor(x, [24, 16], [16, 1], [16, 16])
    caught("load out of bounds at x[element 320], whose shape is (20, 16)",
           descriptor_kernel, (2,), claimed, TensorDescriptor.from_tensor(out, [16, 16]), R=16, C=16)  # fmt: skip


def test_descriptors_made_by_a_kernel_are_held_to_the_tensor_beneath():
    x, out = normal(20, 16), torch.zeros(32, 16)
    with guard.check():
        own_descriptor_kernel[(1,)](x, out, 20, R=32, C=16)
    assert torch.equal(out[:20], x)
    caught("load out of bounds at x[element 320]", own_descriptor_kernel, (1,), x, out, 21, R=32, C=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_and_flops_equal_the_closed_form(dtype):
    x, out = normal(20, dtype=dtype), torch.zeros(32)
    with guard.check() as seen:
        copy_kernel[(2,)](x, out, 20, 30, 1, 1, N=16)
        copy_kernel[(2,)](x, out, 20, 30, 1, 1, N=16)
    assert seen.loads == {"x": 2 * 20 * dtype.itemsize} and seen.stores == {"out": 2 * 30 * 4}
    assert (seen.load_bytes, seen.store_bytes, seen.dot_flops) == (40 * dtype.itemsize, 240, 0)
    assert seen.launches == {"copy_kernel": 2}


def test_errors_of_other_kinds_are_left_as_they_are():
    with guard.check(), pytest.raises(triton.runtime.errors.InterpreterError, match="K >= 16"):
        dot_kernel[(1,)](normal(16, 8).bfloat16(), normal(8, 16).bfloat16(), torch.empty(16, 16), M=16, N=16, K=8, PRECISION="ieee")


def test_allocations_are_poisoned_and_torch_left_as_it_was():
    before = torch.are_deterministic_algorithms_enabled()
    with guard.poisoned_allocations():
        fresh = torch.empty(5), torch.zeros(1).new_empty(5), torch.empty_like(torch.zeros(5, dtype=torch.bfloat16))
        assert all(x.isnan().all() for x in fresh)
    assert torch.are_deterministic_algorithms_enabled() == before


def test_missing_private_name_is_reported_in_words(monkeypatch):
    interpreter = guard.interpreter
    monkeypatch.setattr(interpreter, "interpreter_builder", interpreter.InterpreterBuilder())
    monkeypatch.delattr(interpreter, "_implicit_cvt")
    with pytest.raises(RuntimeError, match=r"triton .* has no .*_implicit_cvt"):
        guard.install()
