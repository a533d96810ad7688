"""Hidden states in 8 bits: rows turned by the Hadamard blocks of `quantised`, so that outlier channels cost no accuracy, a scale each."""

from torch import Tensor

from distill_kernels.estimators import quantised


def quantise(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (n, D) as int8 (n, D'), D' the next multiple of 64, and scales (n,) float32."""
    rows, scales = quantised.quantise(hidden, "int8")
    return rows, scales[:, 0].contiguous()


def restore(rows: Tensor, scales: Tensor, dim: int) -> Tensor:
    """Hidden states (..., D) float32, of rows (..., D') int8 and scales (...) float32."""
    blocks = (rows.float() * scales.unsqueeze(-1)).unflatten(-1, (-1, quantised.BLOCK))
    # The matrix is orthogonal: its transpose turns back.
    turned_back = (blocks @ quantised.hadamard(rows.device).T).flatten(-2)[..., :dim]
    hidden: Tensor = turned_back * quantised.signs(dim, rows.device)
    return hidden
