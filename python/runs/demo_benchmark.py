"""Time and peak memory of one loss step, fused and in eager torch, on the demo's own hidden states.

A loss step is the loss and its gradients alone: hidden states and heads in, gradients of the student's hidden states and head out.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_kernels.api.losses.distillation import distillation_loss
from distill_kernels.api.measuring import loss_variants, peak_memory

REPETITIONS = 5
WARM_UP_TOKENS = 8
# Both sum 49,152 float32 terms in different orders; a wrong kernel is wrong by orders of magnitude more.
LARGEST_DIFFERENCE = 1e-3
VARIANTS: dict[str, loss_variants.Loss] = {"fused": distillation_loss, "eager": loss_variants.eager}


def _step(variant: str, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """(d_hidden (N, D_s), d_weight (V, D_s)) of forward KL at temperature 1."""
    leaves = [inputs[name].requires_grad_() for name in ("student_hidden", "student_weight")]
    return torch.autograd.grad(VARIANTS[variant](**inputs), leaves)


def compare_loss_steps(inputs: dict[str, Any], progress: Callable[[Iterable[int], str], Iterable[int]]) -> dict[str, Any]:
    """Gradient agreement, then milliseconds and peak bytes of both variants.

    Args:
        inputs: as_student() and as_teacher() of two BackboneOutput, hidden states flattened to (N, D).
        progress: wraps an iterable in a progress bar, given that and a description.

    Returns:
        tokens, vocabulary, gradient_difference (largest, relative to the largest gradient), and for "fused" and "eager" milliseconds
        (every repetition), median_ms, and peak_bytes above the inputs or None where the system does not tell.
    """
    inputs = {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    difference = max(
        float((fused - eager).abs().max() / eager.abs().max())
        for fused, eager in zip(_step("fused", inputs), _step("eager", inputs), strict=True)
    )
    if not difference <= LARGEST_DIFFERENCE:
        raise RuntimeError(f"fused and eager gradients differ by {difference:.1e} of the largest gradient, so timing them means nothing")
    milliseconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in progress(range(REPETITIONS), "loss step, both ways"):
        for variant, times in milliseconds.items():
            start = time.perf_counter()
            _step(variant, inputs)
            times.append(1e3 * (time.perf_counter() - start))
    result: dict[str, Any] = {
        "tokens": inputs["student_hidden"].shape[0],
        "vocabulary": inputs["student_weight"].shape[0],
        "threads": torch.get_num_threads(),
        "gradient_difference": difference,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.pt"
        torch.save({name: value.detach() if isinstance(value, Tensor) else value for name, value in inputs.items()}, path)
        for variant, times in milliseconds.items():
            result[variant] = {
                "milliseconds": times,
                "median_ms": statistics.median(times),
                "peak_bytes": _peak_bytes(variant, path),
            }
    return result


def _peak_bytes(variant: str, path: Path) -> int | None:
    """Above the inputs."""
    peak: int | None = peak_memory.in_own_process(__name__, variant, str(path))
    return peak


def _measure_peak(variant: str, path: str) -> int | None:
    inputs = torch.load(path)  # which writes every page of them
    few = {name: value[:WARM_UP_TOKENS] if name.endswith("hidden") else value for name, value in inputs.items()}
    # Thread pools and code pages are paid for here.
    _step(variant, few)
    return peak_memory.above(lambda: _step(variant, inputs), torch.device("cpu"))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps(_measure_peak(*sys.argv[2:])))
