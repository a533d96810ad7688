"""Variants of the loss at one size: each found right at this very size, then timed in turns. A variant without a verdict gets no time."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import cases
from benchmarks.gpu_suite.journal import emit
from benchmarks.gpu_suite.stages import Comparison
from benchmarks.gpu_suite.work.machine import MOST_ROUNDS, card, device, has_gpu, in_turns, name_of, quartiles
from benchmarks.gpu_suite.work.right import estimate, multiplies_16_bits
from benchmarks.gpu_suite.work.variants import Variant, variant
from benchmarks.gpu_suite.work.verdicts import OTHERS, OURS, Bounds, verdict
from distill_kernels.call import worthwhile

MIB = 2**20
PRODUCTS = "products"
SHARE = 0.4  # of a stage's time that goes into rounds
DRY_ROUNDS = 2


def compare(comparison: Comparison, sizes: tuple[int, int, int, int], only_warm: bool) -> None:
    """only_warm: what compiles anything runs once, so that it is in the caches, and nothing else is done. Many do so at once: those without
    need are left out, for all share one memory."""
    if not has_gpu():
        worthwhile.LEAST_TOKENS = worthwhile.LEAST_VOCABULARY = 1  # columns are to be sampled at tiny sizes, too
    dtype = getattr(torch, comparison.dtype if comparison.backward or multiplies_16_bits() else "float32")
    case = cases.Case(comparison.case, *sizes)
    with torch.device(device()):
        tensors = [t.detach().to(device()).requires_grad_(t.requires_grad and comparison.backward) for t in case.tensors(dtype)]
    named = {
        "comparison": comparison.name, "case": case.name, "sizes": sizes, "dtype": name_of(dtype),
        "direction": "forward+backward" if comparison.backward else "forward",
    }  # fmt: skip
    found: dict[str, Variant] = {}
    for name in comparison.variants:
        try:
            found[name] = variant(name)
        except (ImportError, NotImplementedError) as error:
            emit(kind="verdict", **named, variant=name, verdict="NOT HERE", why=str(error)[:300])
    if only_warm:
        for name, one in found.items():
            if one.compiles:
                steps = [step_of(one, comparison.backward), *([one.predicted] if one.predicted is not None else [])]
                ended = [why for step in steps if (why := why_not_run(step, tensors)) is not None]
                emit(kind="warm", **named, variant=name, ended=ended or "done")
        return
    judged = Judge(tensors, comparison.backward)
    usable, peaks = {}, {}
    for name, one in found.items():
        step = step_of(one, comparison.backward)
        try:
            result = judged(one, step)
            emit(**named, variant=name, **result)
            if result["verdict"] == "PASS":
                peaks[name] = peak_mib(step, tensors)
                usable[name] = step
        except Exception as error:  # noqa: BLE001  (another library's failure, or ours, is a result, and the others are still to be timed)
            emit(kind="verdict", **named, variant=name, verdict="ERROR", why=f"{type(error).__name__}: {error}"[:500])
            if has_gpu():
                torch.cuda.synchronize()  # raises where the device is lost: nothing here can go on then
                torch.cuda.empty_cache()
    judged.forget()
    if not usable:
        raise SystemExit("no variant was found right: there is nothing to time")
    teacher = any(one.teacher for one in found.values())
    steps = {PRODUCTS: products(tensors, comparison.backward, teacher)} | {
        name: lambda step=step: step(*tensors) for name, step in usable.items()
    }
    found[PRODUCTS] = Variant(None, teacher=teacher)
    peaks[PRODUCTS] = None

    def timed(samples: dict[str, list[float]]) -> None:
        figures = {name: quartiles(times) for name, times in samples.items()}
        for name, (low, median, high) in figures.items():
            one = found[name]
            emit(
                kind="time", **named, variant=name, milliseconds=median * 1e3, quartile_1=low * 1e3, quartile_3=high * 1e3,
                rounds=len(samples[name]), to_products=median / figures[PRODUCTS][1], peak_mib=peaks[name],
                tflops=one.flops(case, comparison.backward) / median / 1e12,
                gbps=one.bytes(case, comparison.backward, dtype.itemsize) / median / 1e9, **card(),
            )  # fmt: skip

    in_turns(steps, comparison.seconds * SHARE, timed, most=MOST_ROUNDS if has_gpu() else DRY_ROUNDS)


def why_not_run(step: Callable, tensors: list[torch.Tensor]) -> str | None:
    try:
        step(*tensors)
    except Exception as error:  # noqa: BLE001  (when it is timed, it will be said again, and then it counts)
        return f"{type(error).__name__}: {error}"[:300]
    return None


def step_of(one: Variant, backward: bool) -> Callable:
    return cases.forward_backward(one.loss) if backward else cases.forward_only(one.loss)


class Judge:
    """Compares variants with float32 eager at the size that is timed; holds its gradients until it is to forget them."""

    def __init__(self, tensors: list[torch.Tensor], backward: bool):
        self.tensors, self.backward = tensors, backward
        self.truths: dict[Callable, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def __call__(self, one: Variant, step: Callable) -> dict[str, Any]:
        if one.truth not in self.truths:
            self.truths[one.truth] = self._truth(one.truth)
        true_value, truths = self.truths[one.truth]
        value = step(*self.tensors).detach()
        gradients = [t.grad for t in self.tensors[:2]] if self.backward else []
        bounds: Bounds = (OURS if one.ours else OTHERS)[self.tensors[0].dtype]
        if one.predicted is not None and self.backward:
            bounds = estimate(bounds, one.predicted(*self.tensors))
        return verdict(value, gradients, true_value, truths, bounds).record()

    def _truth(self, loss: Callable) -> tuple[torch.Tensor, list[torch.Tensor]]:
        wide = [t.detach().float().requires_grad_(self.backward and i < 2) for i, t in enumerate(self.tensors)]
        if not self.backward:
            return cases.forward_only(loss)(*wide), []
        value = cases.forward_backward(loss)(*wide).detach()
        return value, [t.grad for t in wide[:2]]

    def forget(self) -> None:
        self.truths.clear()
        for tensor in self.tensors[:2]:
            tensor.grad = None
        if has_gpu():
            torch.cuda.empty_cache()


def products(tensors: list[torch.Tensor], backward: bool, teacher: bool) -> Callable:
    """The matrix products of the loss alone, in the tensors' dtype."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = (t.detach() for t in tensors)
    size, new = (len(student_hidden), len(student_weight)), {"dtype": student_hidden.dtype, "device": student_hidden.device}
    dz = torch.randn(*size, **new) if backward else None

    def step() -> None:
        student_hidden @ student_weight.T
        if teacher:
            teacher_hidden @ teacher_weight.T
        if dz is not None:
            dz @ student_weight
            dz.T @ student_hidden

    return step


def peak_mib(step: Callable, tensors: list[torch.Tensor]) -> float | None:
    """MiB at the peak of a step, above what was there before it: gradients and all that is held on the way."""
    if not has_gpu():
        return None
    for tensor in tensors[:2]:
        tensor.grad = None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(*tensors)
    return (torch.cuda.max_memory_allocated() - before) / MIB
