"""One case of the GPU suite: gradient error, peak memory and time of every variant of the loss, forward + backward and forward alone."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import distill_kernels
from benchmarks import cases
from benchmarks.cases import Case
from distill_kernels import backends
from distill_kernels.call.problem import Problem

GATE_TOKENS = 256  # whose gradients are compared with float32 eager's
ERRORS = {"float32": 2e-2, "bfloat16": 0.2}  # relative; float32 allows for TF32 where torch's switch is on
FRACTIONS = (0.08,)  # of the columns, in the variants that sample them
SWEEPS = ("int8", "fp8")  # whose sums those of the first fraction correct; heads are quantised at every call, as a student's is
# An estimate errs as it predicts, to this factor: by no more, and by no less, as it would without its weights. The cases' flat softmaxes
# are the worst there is for sampling columns, about 300 %.
OF_PREDICTED = 1.5
FORWARD = ("ours", "ours, cuda", "eager")  # variants that do something else where no gradient is asked, and what they are held against
MIB = 2**20


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if has_gpu() else "cpu")


def synchronise():
    if has_gpu():
        torch.cuda.synchronize()


def name_of(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seconds(step) -> float:
    """Of one call: between two events on a GPU's stream."""
    if not has_gpu():
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(steps: dict, budget: float, most=20, each=lambda samples: None) -> dict[str, list[float]]:
    """Seconds of every step, each in its turn, for `budget` seconds and three rounds at least. `each` is called after every round."""
    samples = {name: [] for name in steps}
    begin = time.perf_counter()
    for done in range(most):
        if done >= 3 and time.perf_counter() - begin >= budget:
            break
        for name, step in steps.items():
            samples[name].append(seconds(step))
        each(samples)
    return samples


class Variant(NamedTuple):
    loss: Callable
    truth: Callable = cases.eager  # whose gradients in float32 it should have
    teacher: bool = True
    columns: float = 1.0  # share of the vocabulary that its gradient products go over
    predicted: Callable | None = None  # the error of its gradients by its own word, where it estimates them

    def flops(self, case: Case, backward: bool) -> float:
        dims = case.student_dim * (1 + 2 * self.columns * backward) + case.teacher_dim * self.teacher
        return 2 * case.tokens * case.vocabulary * dims

    def bytes(self, case: Case, backward: bool, element: int) -> int:
        """Of inputs and gradients, each of them once."""
        return (case.tokens + case.vocabulary) * (case.student_dim * (1 + backward) + case.teacher_dim * self.teacher) * element


def variants() -> dict[str, Variant]:
    found = {"ours": Variant(cases.fused("triton"))}
    for fraction in FRACTIONS:
        options = {"column_fraction": fraction, "seed": 0}
        predicted = _predicted("triton", **options)
        found[f"ours, {fraction:.0%} of columns"] = Variant(cases.fused("triton", **options), columns=fraction, predicted=predicted)
    for sweep in SWEEPS:
        options = {"column_fraction": FRACTIONS[0], "seed": 0, "sweep": sweep, "sweep_tolerance": None}
        predicted = _predicted("triton", **options)
        found[f"ours, {sweep} sweep"] = Variant(cases.fused("triton", **options), columns=FRACTIONS[0], predicted=predicted)
    if why_no_cuda() is None:
        found["ours, cuda"] = Variant(cases.fused("cuda"))
        options = {"column_fraction": FRACTIONS[0], "seed": 0}
        sampled = Variant(cases.fused("cuda", **options), columns=FRACTIONS[0], predicted=_predicted("cuda", **options))
        found[f"ours, cuda, {FRACTIONS[0]:.0%} of columns"] = sampled
    found |= {"torch backend": Variant(cases.fused("torch")), "eager": Variant(cases.eager)}
    if has_gpu():
        found["compiled"] = Variant(torch.compile(cases.eager, dynamic=False))
    return found | {name: Variant(loss) for name, loss in peers().items()} | cross_entropies()


def why_no_cuda() -> str | None:
    """Why the cuda backend cannot run here; None: it can."""
    plain = torch.float32
    problem = Problem(tokens=1, vocabulary=2, student_dim=1, teacher_dim=1, student_dtype=plain, teacher_dtype=plain, device=device())
    return backends.load("cuda").why_not(problem)


def _predicted(backend, **options):
    def error(*tensors) -> float:
        _, stats = distill_kernels.distillation_loss_and_stats(*tensors, backend=backend, **options)
        return stats.gradient_error.max().item()

    return error


def peers() -> dict[str, Callable]:
    """Losses of other libraries, by name; those of cases.peers and what runs on a GPU only, all as their users run them."""
    found = cases.peers(compiled=has_gpu())
    if has_gpu():
        try:
            from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
        except ImportError:
            pass
        else:
            jsd = LigerFusedLinearJSD(jsd_beta=0.0)
            found["liger-triton"] = lambda *tensors: jsd(*tensors, torch.zeros(len(tensors[0]), dtype=torch.int64, device=device()))
    return found


def cross_entropies() -> dict[str, Variant]:
    """Hard-label losses of the student alone: this library's, and where it is installed CCE's."""

    def labels(hidden, weight):
        return torch.arange(len(hidden), device=hidden.device) % len(weight)

    def eager(hidden, weight, *_):
        return F.cross_entropy((hidden @ weight.T).float(), labels(hidden, weight))

    def ours(hidden, weight, *_):
        options = {"kd_weight": 0.0, "ce_weight": 1.0, "backend": "triton"}
        return distill_kernels.distillation_loss(hidden, weight, None, None, labels(hidden, weight), **options)

    losses = {"ours (cross entropy)": ours}
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        pass
    else:
        losses["cce (cross entropy)"] = lambda hidden, weight, *_: linear_cross_entropy(hidden, weight, labels(hidden, weight))
    return {name: Variant(loss, truth=eager, teacher=False) for name, loss in losses.items()}


def run_case(case: Case, dtype: torch.dtype, budget: float, report: Callable[[list[dict]], None]):
    """`report` gets a row for every variant and direction, as far as they are known, after each step and each round."""
    with torch.device(device()):
        tensors = [t.detach().to(device()).requires_grad_(t.requires_grad) for t in case.tensors(dtype)]
    found = variants()
    errors = gradient_errors(case, found, tensors)
    torch.compiler.reset()  # what is compiled from here on sees no shape but the timed one, which would make a dynamic graph of it
    if has_gpu():
        del found["torch backend"]  # its float32 gradient products are a check of ours, not a rival
    directions = {
        "forward+backward": {"products": cases.all_products(*(t.detach() for t in tensors[:2]))}
        | {name: cases.forward_backward(variant.loss) for name, variant in found.items()},
        "forward": {"products": cases.forward_products} | {name: cases.forward_only(found[name].loss) for name in FORWARD if name in found},
    }
    found["products"] = Variant(None)
    table = {
        (direction, name): {
            "case": case.name, "tokens": case.tokens, "vocabulary": case.vocabulary, "student_dim": case.student_dim,
            "teacher_dim": case.teacher_dim, "dtype": name_of(dtype), "direction": direction, "variant": name, "failed": "not reached",
            **(errors.get(name, {}) if direction == "forward+backward" else {}),
        }
        for direction, steps in directions.items()
        for name in steps
    }  # fmt: skip
    for direction, steps in directions.items():
        backward, usable = direction == "forward+backward", {}
        for name, step in steps.items():
            row = table[direction, name]
            if not row.get("least", 0.0) <= row.get("error", 0.0) <= row.get("bound", 0.0):
                row["failed"] = "wrong gradients"
                continue
            peak = memory_of(step, tensors)
            if isinstance(peak, str):
                row["failed"] = peak
            else:
                row["peak_mib"] = peak
                usable[name] = lambda step=step: step(*tensors)
            report(list(table.values()))

        def timed(samples, direction=direction, backward=backward):
            medians = {name: statistics.median(times) for name, times in samples.items()}
            for name, median in medians.items():
                row, variant = table[direction, name], found[name]
                row.pop("failed", None)
                row["milliseconds"], row["rounds"] = median * 1e3, len(samples[name])
                row["tflops"] = variant.flops(case, backward) / median / 1e12
                row["gbps"] = variant.bytes(case, backward, dtype.itemsize) / median / 1e9
                row |= {f"to_{other}": median / medians[other] for other in ("products", "eager") if other in medians}
            report(list(table.values()))

        interleaved(usable, budget / 2, each=timed)


def gradient_errors(case, found: dict[str, Variant], tensors) -> dict[str, dict]:
    """Relative Frobenius error of the gradients on the case's first tokens, against a float32 eager loss of the same inputs; the least
    and the most (bound) that it may be."""
    tokens = min(case.tokens, GATE_TOKENS)
    some = [t.detach()[:tokens] if i % 2 == 0 else t.detach() for i, t in enumerate(tensors)]
    truths, errors = {}, {}
    for name, variant in found.items():
        if variant.truth not in truths:
            wide = [t.float().clone().requires_grad_(i < 2) for i, t in enumerate(some)]
            cases.forward_backward(variant.truth)(*wide)
            truths[variant.truth] = [t.grad for t in wide[:2]]
            del wide
        leaves = [t.clone().requires_grad_() if i < 2 else t for i, t in enumerate(some)]
        try:
            cases.forward_backward(variant.loss)(*leaves)
            errors[name] = {"error": cases.gradient_error(leaves, truths[variant.truth], 1.0), "bound": ERRORS[name_of(leaves[0].dtype)]}
            if variant.predicted is not None:
                predicted = variant.predicted(*leaves)
                errors[name] |= {"least": predicted / OF_PREDICTED, "bound": predicted * OF_PREDICTED}
        except Exception as error:  # noqa: BLE001  (another library's failure is a result, not ours to stop for)
            errors[name] = {"error": float("inf"), "bound": 0.0, "why": f"{type(error).__name__}: {error}"[:300]}
    return errors


def memory_of(step, tensors) -> float | str:
    """MiB at the peak of a step, above what was there before it; or why there is none."""
    try:
        step(*tensors)  # compiles, and fills caches
        for tensor in tensors[:2]:
            tensor.grad = None
        if not has_gpu():
            step(*tensors)
            return 0.0
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(*tensors)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"[:300]
