"""The same loss by others: eager torch as one writes it without a library, and the libraries that are installed.

Each is a function of student_hidden (N, D_s), student_weight (V, D_s), teacher_hidden (N, D_t), teacher_weight (V, D_t), and returns the
mean over tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_kernels.divergences import Divergence, resolve

Loss = Callable[..., Tensor]  # of the four, and the mean
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Liger's and TRL's weight of a mixture, of which the ends are the KLs.
MIXTURES = {"forward_kl": 0.0, "reverse_kl": 1.0}


def eager(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: str | Divergence = "forward_kl",
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """Logits of both models, whole, float32 softmaxes and torch's KL: forward_kl, reverse_kl or jensen_shannon, at temperature 1."""
    log_q = _log_probabilities(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    with torch.no_grad():
        log_p = _log_probabilities(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)

    def kl(of: Tensor, to: Tensor) -> Tensor:
        return F.kl_div(to, of, reduction="batchmean", log_target=True)

    divergence = resolve(divergence)
    if divergence.name == "forward_kl":
        return kl(log_p, log_q)
    if divergence.name == "reverse_kl":
        return kl(log_q, log_p)
    if divergence.name != "jensen_shannon":
        raise NotImplementedError(f"eager torch is written for forward_kl, reverse_kl and jensen_shannon, not for {divergence}")
    (beta,) = divergence.parameters
    weights = torch.tensor([beta, 1 - beta], device=log_q.device).log()
    log_m = torch.logaddexp(log_p + weights[0], log_q + weights[1])
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def _log_probabilities(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None
) -> Tensor:
    logits = F.linear(hidden, weight, bias).float()
    if logit_scale != 1:
        logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.log_softmax(logits, dim=-1)


def peers(divergence: str | Divergence = "forward_kl", compiled: bool = False) -> dict[str, Loss]:
    """Those that are installed and have the divergence, by name.

    compiled: Liger compiles the loss of a chunk, as it does unless told not to.
    """
    divergence = resolve(divergence)
    if divergence.name not in (*MIXTURES, "jensen_shannon"):
        return {}
    beta = MIXTURES.get(divergence.name, *divergence.parameters)
    found: dict[str, Loss] = {}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        pass
    else:
        liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)

        def liger_loss(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
            labels = torch.zeros(student_hidden.shape[0], dtype=torch.int64, device=student_hidden.device)
            loss: Any = liger(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
            value: Tensor = loss[0] if isinstance(loss, tuple) else loss
            return value

        found["liger"] = liger_loss
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError:
        pass
    else:

        def trl_loss(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
            # Biases, beta, temperature, then scale and softcap of either model.
            student, teacher, options = (student_hidden, student_weight, None), (teacher_hidden, teacher_weight, None), (beta, 1.0)
            losses: Tensor = ChunkedDivergenceFunction.apply(*student, *teacher, *options, 1.0, None, 1.0, None)[0]
            return losses.mean()

        found["trl"] = trl_loss
    return found


def forward_backward(loss: Loss, scale: float = 1.0) -> Step:
    """The whole step of a loss: value and both gradients, those times `scale`, as a loss scaler has them for float16."""

    def step(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        student_hidden.grad = student_weight.grad = None
        value = loss(student_hidden, student_weight, teacher_hidden, teacher_weight)
        (value * scale).backward()
        return value

    return step


def gradient_error(tensors: Sequence[Tensor], truth: Sequence[Tensor], scale: float = 1.0) -> float:
    """Largest relative Frobenius error of the two gradients."""
    made = [tensor.grad for tensor in tensors[:2] if tensor.grad is not None]
    return max(float((d.float() / scale - g).norm() / g.norm()) for d, g in zip(made, truth, strict=True))


def random_problem(tokens: int, vocabulary: int, student_dim: int, teacher_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and heads of both models, float32, with logits of unit variance: flat softmaxes, which only the values feel."""
    torch.manual_seed(0)
    student = torch.randn(tokens, student_dim), torch.randn(vocabulary, student_dim) / student_dim**0.5
    teacher = torch.randn(tokens, teacher_dim), torch.randn(vocabulary, teacher_dim) / teacher_dim**0.5
    return *student, *teacher
