"""The losses that are compared, by the names that `stages` gives them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import distill_kernels
from benchmarks import cases
from benchmarks.gpu_suite.work.machine import device, has_gpu
from benchmarks.gpu_suite.work.right import why_not

FRACTION = 0.08  # of the columns


class Variant(NamedTuple):
    loss: Callable | None  # of student_hidden, student_weight, teacher_hidden, teacher_weight
    truth: Callable = cases.eager  # whose value and gradients in float32 it should have
    teacher: bool = True
    ours: bool = True
    columns: float = 1.0  # share of the vocabulary that its gradient products go over
    predicted: Callable | None = None  # the error of its gradients by its own word, where it estimates them
    compiles: bool = True  # something that is worth having in a cache

    def flops(self, case: cases.Case, backward: bool) -> float:
        dims = case.student_dim * (1 + 2 * self.columns * backward) + case.teacher_dim * self.teacher
        return 2 * case.tokens * case.vocabulary * dims

    def bytes(self, case: cases.Case, backward: bool, element: int) -> int:
        """Of inputs and gradients, each of them once."""
        return (case.tokens + case.vocabulary) * (case.student_dim * (1 + backward) + case.teacher_dim * self.teacher) * element


def variant(name: str) -> Variant:
    """Raises ImportError or NotImplementedError, in words, where it cannot be had."""
    return VARIANTS[name]()


def _ours(backend: str, **options: Any) -> Variant:
    if (reason := why_not(backend)) is not None:
        raise NotImplementedError(reason)
    return Variant(cases.fused(backend, **options))


def _sampled(backend: str, sweep: str | None = None) -> Variant:
    # No tolerance: what is timed is the sweep, not the exact loss that a chunk above it would fall back to.
    options = {"column_fraction": FRACTION, "seed": 0} | ({"sweep": sweep, "sweep_tolerance": None} if sweep else {})
    prepared: dict[int, distill_kernels.PreparedHead] = {}

    def heads(tensors: tuple[torch.Tensor, ...]) -> tuple:
        """The teacher's head, which does not change, quantised once; the student's at every call."""
        if sweep is None:
            return tensors
        teacher_weight = tensors[3]
        if teacher_weight.data_ptr() not in prepared:
            prepared[teacher_weight.data_ptr()] = distill_kernels.prepare_head(teacher_weight)
        return *tensors[:3], prepared[teacher_weight.data_ptr()]

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return distill_kernels.distillation_loss(*heads(tensors), backend=backend, **options)

    def predicted(*tensors: torch.Tensor) -> float:
        _, stats = distill_kernels.distillation_loss_and_stats(*heads(tensors), backend=backend, **options)
        return stats.gradient_error.max().item()

    return _ours(backend)._replace(loss=loss, columns=FRACTION, predicted=predicted)


def _chunked_forward() -> Variant:
    """Without gradients the logits are kept where the stats are asked for."""
    return _ours("triton")._replace(loss=lambda *tensors: distill_kernels.distillation_loss_and_stats(*tensors, backend="triton")[0])


def _compiled() -> Variant:
    backend = "inductor" if has_gpu() else "aot_eager"
    return Variant(torch.compile(cases.eager, dynamic=False, backend=backend), ours=False)


def _liger() -> Variant:
    found = cases.peers(compiled=has_gpu())
    if "liger" not in found:
        raise ImportError("Liger is not installed")
    return Variant(found["liger"], ours=False)


def _liger_triton() -> Variant:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    if not has_gpu():
        raise NotImplementedError("its kernels want a GPU")
    jsd = LigerFusedLinearJSD(jsd_beta=0.0)
    return Variant(lambda *tensors: jsd(*tensors, torch.zeros(len(tensors[0]), dtype=torch.int64, device=device())), ours=False)


@functools.cache
def _random_labels(tokens: int, vocabulary: int, where: torch.device) -> torch.Tensor:
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).to(where)


def _labels(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """All over the vocabulary: who skips blocks without a label would skip most of it if they were the first entries."""
    return _random_labels(len(hidden), len(weight), hidden.device)


def _eager_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), _labels(hidden, weight))


def _cross_entropy(loss: Callable, ours: bool) -> Variant:
    return Variant(loss, truth=_eager_cross_entropy, teacher=False, ours=ours)


def _our_cross_entropy() -> Variant:
    def loss(hidden: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"kd_weight": 0.0, "ce_weight": 1.0, "backend": "triton"}
        return distill_kernels.distillation_loss(hidden, weight, None, None, _labels(hidden, weight), **options)

    return _cross_entropy(loss, ours=True)


def _cce() -> Variant:
    from cut_cross_entropy import linear_cross_entropy

    if not has_gpu():
        raise NotImplementedError("its kernels want a GPU")
    return _cross_entropy(lambda hidden, weight, *_: linear_cross_entropy(hidden, weight, _labels(hidden, weight)), ours=False)


VARIANTS: dict[str, Callable[[], Variant]] = {
    "ours": lambda: _ours("triton"),
    "ours, 2.5 GiB": lambda: _ours("triton", workspace_mib=2560),
    "ours, 5 GiB": lambda: _ours("triton", workspace_mib=5120),
    "ours, chunked": _chunked_forward,
    "8% of columns": lambda: _sampled("triton"),
    "int8 sweep": lambda: _sampled("triton", "int8"),
    "fp8 sweep": lambda: _sampled("triton", "fp8"),
    "ours, cross entropy": _our_cross_entropy,
    "cuda": lambda: _ours("cuda"),
    "cuda, 8% of columns": lambda: _sampled("cuda"),
    "eager": lambda: Variant(cases.eager, ours=False, compiles=False),
    "torch.compile": _compiled,
    "liger": _liger,
    "liger, triton": _liger_triton,
    "eager, cross entropy": lambda: _cross_entropy(_eager_cross_entropy, ours=False)._replace(compiles=False),
    "cce": _cce,
}
