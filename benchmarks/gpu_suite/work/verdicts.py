"""Right or not: a value and gradients beside the true ones, and the bounds that they are held to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bounds:
    """Relative errors that pass. An estimate of the gradients has bounds of its own, by what it predicts."""

    value: float
    gradient: float  # Frobenius
    row: float  # the worst row of a gradient, of its own norm or a typical row's where that is more: one bad tile cannot hide in the rest
    least: float = 0.0  # of `gradient`: who estimates and errs by less than this does something else than it says


# float32 accumulation of 16-bit products; dz and gradients are rounded to 16 bits.
OURS = {torch.bfloat16: Bounds(2e-3, 1e-2, 0.1), torch.float32: Bounds(1e-5, 1e-4, 1e-3)}
# Whoever rounds the logits themselves to 16 bits errs by percents, and is timed all the same; the table says by how much.
OTHERS = {torch.bfloat16: Bounds(2e-2, 5e-2, 0.5), torch.float32: Bounds(1e-4, 1e-2, 0.1)}


@dataclass(frozen=True)
class Verdict:
    value_error: float
    gradient_error: float | None
    row_error: float | None
    bounds: Bounds

    @property
    def right(self) -> bool:
        # Not `any(error > bound)`: a NaN is to fail.
        if not self.value_error <= self.bounds.value:
            return False
        if self.gradient_error is None or self.row_error is None:
            return True
        return self.bounds.least <= self.gradient_error <= self.bounds.gradient and self.row_error <= self.bounds.row

    def record(self) -> dict:
        errors = {"value_error": self.value_error, "gradient_error": self.gradient_error, "row_error": self.row_error}
        return {"kind": "verdict", "verdict": "PASS" if self.right else "FAIL", **errors, "bounds": asdict(self.bounds)}


def verdict(value: Tensor, gradients: Sequence[Tensor], true_value: Tensor, truths: Sequence[Tensor], bounds: Bounds) -> Verdict:
    """`gradients`: none where none were asked for."""
    value_error = float((value.double() - true_value.double()).abs() / true_value.double().abs())
    if not gradients:
        return Verdict(value_error, None, None, bounds)
    errors = [errors_of(made, true) for made, true in zip(gradients, truths, strict=True)]
    return Verdict(value_error, *(_largest(kind) for kind in zip(*errors, strict=True)), bounds)


def errors_of(made: Tensor, true: Tensor) -> tuple[float, float]:
    """(Frobenius, worst row), relative."""
    off = (made.to(true.dtype) - true).norm(dim=-1)
    rows = true.norm(dim=-1)
    typical = rows.square().mean().sqrt()
    return float(off.norm() / rows.norm()), float((off / rows.clamp(min=float(typical))).max())


def _largest(errors: Sequence[float]) -> float:
    return float(torch.tensor(errors).max())  # NaN if any is
