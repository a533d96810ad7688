"""The same loss by others: eager torch as one writes it without a library, and the libraries that are installed.

Each is a function of student_hidden (N, D_s), student_weight (V, D_s), teacher_hidden (N, D_t), teacher_weight (V, D_t), and returns the
mean over tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_kernels.divergences import Divergence, resolve

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

    def kl(of, to):
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


def _log_probabilities(hidden, weight, bias, logit_scale, softcap):
    logits = F.linear(hidden, weight, bias).float()
    if logit_scale != 1:
        logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.log_softmax(logits, dim=-1)


def peers(divergence: str | Divergence = "forward_kl", compiled: bool = False) -> dict[str, Callable]:
    """Those that are installed and have the divergence, by name.

    compiled: Liger compiles the loss of a chunk, as it does unless told not to.
    """
    divergence = resolve(divergence)
    if divergence.name not in (*MIXTURES, "jensen_shannon"):
        return {}
    beta = MIXTURES.get(divergence.name, *divergence.parameters)
    found = {}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        pass
    else:
        liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)

        def liger_loss(student_hidden, student_weight, teacher_hidden, teacher_weight):
            labels = torch.zeros(student_hidden.shape[0], dtype=torch.int64, device=student_hidden.device)
            loss = liger(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
            return loss[0] if isinstance(loss, tuple) else loss

        found["liger"] = liger_loss
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError:
        pass
    else:

        def trl_loss(student_hidden, student_weight, teacher_hidden, teacher_weight):
            # Biases, beta, temperature, then scale and softcap of either model.
            student, teacher, options = (student_hidden, student_weight, None), (teacher_hidden, teacher_weight, None), (beta, 1.0)
            return ChunkedDivergenceFunction.apply(*student, *teacher, *options, 1.0, None, 1.0, None)[0].mean()

        found["trl"] = trl_loss
    return found


def forward_backward(loss: Callable, scale: float = 1.0) -> Callable:
    """The whole step of a loss: value and both gradients, those times `scale`, as a loss scaler has them for float16."""

    def step(student_hidden, student_weight, teacher_hidden, teacher_weight):
        student_hidden.grad = student_weight.grad = None
        value = loss(student_hidden, student_weight, teacher_hidden, teacher_weight)
        (value * scale).backward()
        return value

    return step


def gradient_error(tensors, truth, scale: float = 1.0) -> float:
    """Largest relative Frobenius error of the two gradients."""
    return max(float((t.grad.float() / scale - g).norm() / g.norm()) for t, g in zip(tensors[:2], truth, strict=True))


def random_problem(tokens: int, vocabulary: int, student_dim: int, teacher_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and heads of both models, float32, with logits of unit variance: flat softmaxes, which only the values feel."""
    torch.manual_seed(0)
    tensors = []
    for dim in (student_dim, teacher_dim):
        tensors += [torch.randn(tokens, dim), torch.randn(vocabulary, dim) / dim**0.5]
    return tuple(tensors)
