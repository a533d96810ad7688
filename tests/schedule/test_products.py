"""The way that products take on a GPU, on CPU: torch's float32 products of 16-bit matrices are played by wider ones."""

import pytest
import torch
from accuracy import check_loss, make_inputs

from distill_kernels import products
from distill_kernels.backends import triton as backend
from distill_kernels.call.options import Options
from distill_kernels.call.problem import Problem
from distill_kernels.schedule import chunk_products
from distill_kernels.schedule.plan import make_plan

pytest.importorskip("triton")
NARROW = (torch.bfloat16, torch.float16)
on_both = pytest.mark.parametrize("adds", [False, True], ids=["torch_2.8", "torch_2.10"])


@pytest.fixture
def added(monkeypatch, adds):
    """How often a product was added to a matrix by torch, which refuses what a torch of that time does."""
    calls = []
    mm, addmm = torch.mm, torch.addmm

    def wide_mm(a, b, *, out_dtype=None, out=None):
        assert a.dtype == b.dtype and (out_dtype is None or (a.dtype in NARROW and out.dtype == out_dtype == torch.float32))
        return mm(a, b, out=out) if out_dtype is None else mm(a.float(), b.float(), out=out)

    def wide_addmm(matrix, a, b, *, out_dtype=None, out=None, **options):
        if out_dtype is None:
            return addmm(matrix, a, b, out=out, **options)
        assert adds or matrix.dtype == b.dtype, f"self and mat2 must have the same dtype, but got {matrix.dtype} and {b.dtype}"
        calls.append(matrix.shape)
        return addmm(matrix, a.float(), b.float(), out=out, **options)

    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    monkeypatch.setattr(products, "ADDS_WIDE", adds)
    monkeypatch.setattr(products, "SUM_BYTES", 5000)  # 52 rows of 24 float32 features
    for module in (products, chunk_products):
        monkeypatch.setattr(module, "multiplies_wide", lambda device: True)
    return calls


@on_both
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.covering(1)
def test_gradients_of_several_chunks_match_reference(dtype, adds, added):
    # slack: gradients of logits are rounded to 16 bits before their products, which eager does not do.
    check_loss(make_inputs("realistic", tokens=64, vocabulary=3000, dtype=dtype), backend="triton", workspace_mib=1, slack=2)
    assert bool(added) == adds


@on_both
@pytest.mark.parametrize("vocabulary", [1, 52, 53, 300])
def test_d_weight_is_added_to(vocabulary, adds, added):
    problem = _problem(vocabulary)
    made = products.Products(problem, torch.device("cpu"))
    out = torch.full((vocabulary, 24), torch.nan)
    generator = torch.Generator().manual_seed(0)
    truth = 0
    for first in (True, False, False):
        dz, hidden = (torch.randn(7, size, generator=generator).bfloat16() for size in (vocabulary, 24))
        made.d_weight(dz, hidden, out, first)
        truth = truth + dz.double().T @ hidden.double()
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    assert len(added) == (2 if adds else 0)


@on_both
def test_what_is_multiplied_apart_is_planned(adds, added):
    problem = _problem(300)
    schedule = backend.schedule(problem)
    made = products.Products(problem, torch.device("cpu"))
    assert made.panel.nbytes == products.panel_bytes(problem) <= schedule.fixed_bytes
    assert make_plan(problem, schedule).workspace_bytes <= 2**20
    assert products.sum_rows(problem) == (0 if adds else 52)
    assert products.sum_rows(_problem(300, d_weight=False)) == products.sum_rows(_problem(300, dtype=torch.float32)) == 0


def _problem(vocabulary, dtype=torch.bfloat16, **asked):
    return Problem(64, vocabulary, 24, 40, dtype, dtype, torch.device("cpu"), Options(workspace_mib=1), kd=False, **asked)
