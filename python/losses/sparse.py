"""The loss of a teacher of whom only some log-probabilities were kept: its top k, or any others."""

from torch import Tensor

from distill_kernels.api.losses import per_token
from distill_kernels.api.losses.inputs import Inputs
from distill_kernels.api.losses.logprobs import check_lists
from distill_kernels.call import checks
from distill_kernels.call.options import TAILS, Options
from distill_kernels.divergences import Divergence, resolve
from distill_kernels.ops import listed_entries


def sparse_distillation_loss(
    student_hidden: Tensor,  # (..., D)
    student_weight: Tensor,  # (V, D)
    teacher_ids: Tensor,  # (..., K)
    teacher_logprobs: Tensor,  # (..., K)
    labels: Tensor | None = None,  # (...)
    *,
    tail: str,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    teacher_tail_mass: Tensor | None = None,  # (...)
    temperature_squared: bool = True,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    z_loss_weight: float = 0.0,
    student_bias: Tensor | None = None,  # (V,)
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    token_weight: Tensor | None = None,  # (...)
    ignore_index: int = -100,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_mib: int | None = None,
) -> Tensor:
    """`distillation_loss` of a teacher of whom only some log-probabilities are known: its top k, or any others, k varying by token.

    The loss of a token is  kd_weight · temperature² · D  +  ce_weight · CE(z, label)  +  z_loss_weight · logsumexp(z)²  with meant logits
    z and the student's q = softmax(z / temperature), as in `distillation_loss`. With L the token's ids, p their given probabilities, and
    D(a‖b) = Σ value(log a, log b) over the outcomes of a and b, D is

        tail="bucket"       D of (p_k for k in L, 1 − Σ p) and (q_k for k in L, Σ_{v∉L} q_v): all that is not listed is one outcome. Right
                            where little is not listed; the student learns how much that is, and keeps its own order within.
        tail="renormalise"  D of p_k / Σ p and q_k / Σ_L q: how the listed entries share what they have. How much the student gives to
                            the others has no part in it, and if there is nothing but this, no gradient.
        tail="ignore"       Σ_{k∈L} value(log p_k, log q_k): the terms of the full sum that can be computed. It may be negative, and with
                            "forward_kl" its gradient asks less mass of the student where the list has less. With p renormalised by
                            the caller it is the top-k loss of several trainers (Σ p_k · log(p_k / q_k)). If L is everything, it is
                            `distillation_loss`.

    There is no default, for the three train different students. Gradients go to student_hidden, student_weight and student_bias; they are
    computed together with the loss, 3S in all for N tokens (S = 2·N·V·D flops; nothing for a teacher), and no more than a chunk's logits
    are held. Sums over the vocabulary leave out what is listed, rather than subtract it, so that a bucket is right where it is tiny.

    Arguments
        student_hidden (..., D), student_weight (V, D), student_bias (V,): as in `distillation_loss`.
        teacher_ids (..., K) int64: vocabulary entries, none twice in a row; -1 where a row has fewer than K. A row of none has no
            divergence (0), but a cross entropy, and counts.
        teacher_logprobs (..., K): their natural logarithms of probability in the whole vocabulary, not in the list, at `temperature`;
            −inf is a probability of 0. Floating point, of any dtype; must not require grad. Read where an id is.
        labels (...) int64, ignore_index, token_weight, num_items, reduction: as in `distillation_loss`. reduction="none": (...) per
            token, differentiable, at 4S.
        tail: as above.
        divergence: a name, or for instance distill_kernels.divergences.jensen_shannon(beta=0.1); one that you have registered, too, on any
            backend.
        temperature: of both distributions of the divergence.
        teacher_temperature: of teacher_logprobs, if that is another. Only with tail="renormalise", where p^(teacher_temperature /
            temperature) is as good: otherwise the whole distribution would be needed.
        teacher_tail_mass (...): with tail="bucket", the probability that is not listed, if it was kept. By default 1 − Σ p, which has few
            digits where log-probabilities are of 16 bits: divergences with log p of the tail, like "reverse_kl", notice.
        temperature_squared, kd_weight, ce_weight, z_loss_weight, student_logit_scale, student_softcap, backend, workspace_mib: as in
            `distillation_loss`.

    Returns
        float32 (float64 for float64 hidden states), () or (...). If every token is masked: 0, attached to the graph.

    Raises
        TypeError, ValueError: naming the argument, what was got and what was wanted; on CPU also for ids that are out of range or twice in
        a row, and for log-probabilities that are NaN or sum to more than 1 (by 5 %, which rounding does not explain). On other devices,
        where looking would wait for them, the loss of such a token is NaN. Rows of masked tokens may hold anything. On CPU there is a
        warning where all log-probabilities have been rounded to two decimals, which makes each probability wrong by up to 0.5 %.

    Example
        >>> hidden, head = torch.randn(2, 8, 64, requires_grad=True), torch.randn(1000, 64)
        >>> logprobs, ids = torch.randn(2, 8, 1000).log_softmax(-1).topk(32)
        >>> sparse_distillation_loss(hidden, head, ids, logprobs, tail="bucket").backward()
    """
    checks.one_of("tail", tail, TAILS)
    inputs = Inputs(
        student_hidden, student_weight, labels=labels, student_bias=student_bias, token_weight=token_weight, num_items=num_items
    )  # fmt: skip
    options = Options(
        tail=tail,
        divergence=resolve(divergence),
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        temperature_squared=temperature_squared,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        z_loss_weight=z_loss_weight,
        student_logit_scale=student_logit_scale,
        student_softcap=student_softcap,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=backend,
        workspace_mib=workspace_mib,
    )
    _check_lists(inputs, options, teacher_ids, teacher_logprobs, teacher_tail_mass)

    valid, factor = per_token.factors(inputs, options)
    if labels is not None:
        labels = per_token.marked("labels", labels, valid, len(student_weight))
    tensors = per_token.flat(inputs, labels, per_token.coefficients(factor, options), teacher=False)
    problem = per_token.problem(
        tensors,
        options,
        kd=kd_weight != 0,
        cross_entropy=ce_weight != 0,
        z_loss=z_loss_weight != 0,
        compact=labels is not None or token_weight is not None,
    )
    total, terms = listed_entries.run_terms(
        problem,
        tensors,
        teacher_ids.reshape(-1, teacher_ids.shape[-1]),
        teacher_logprobs.reshape(-1, teacher_ids.shape[-1]),
        None if teacher_tail_mass is None else teacher_tail_mass.reshape(-1),
    )
    return (tensors.coefficients * terms).sum(-1).view(inputs.tokens) if options.deferred else total


def _check_lists(inputs: Inputs, options: Options, ids: Tensor, logprobs: Tensor, tail_mass: Tensor | None) -> None:
    """Raises unless the teacher's lists suit the inputs and the options, and the inputs each other."""
    checks.matrix("student_hidden", inputs.student_hidden)
    check_lists("teacher_ids", ids, inputs.tokens)
    checks.matrix("teacher_logprobs", logprobs)
    if logprobs.shape != ids.shape:
        raise ValueError(f"teacher_logprobs must have the shape of teacher_ids, {tuple(ids.shape)}, got {tuple(logprobs.shape)}")
    if tail_mass is not None:
        checks.tokens("teacher_tail_mass", tail_mass, inputs.tokens, checks.DTYPES, "a floating-point tensor")
        if options.tail != "bucket":
            raise ValueError(f'teacher_tail_mass is what tail="bucket" compares, but tail is {options.tail!r}')
    checks.teacher({"teacher_logprobs": logprobs, "teacher_tail_mass": tail_mass})
    inputs.check(options, teacher_ids=ids, teacher_logprobs=logprobs, teacher_tail_mass=tail_mass)
