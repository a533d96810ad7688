"""Losses of listed vocabulary entries: teachers of whom only the top-k log-probabilities were kept, and log-probabilities of chosen ids."""

from torch import Tensor

from distill_kernels.api.losses import per_token
from distill_kernels.call import problem as contract
from distill_kernels.divergences import resolve
from distill_kernels.listed import TAILS
from distill_kernels.ops import listed_entries


def sparse_distillation_loss(
    student_hidden: Tensor,  # (..., D)
    student_weight: Tensor,  # (V, D)
    teacher_ids: Tensor,  # (..., K)
    teacher_logprobs: Tensor,  # (..., K)
    labels: Tensor | None = None,  # (...)
    *,
    tail: str,
    divergence="forward_kl",
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
        where looking would wait for them, the loss of such a token is NaN. Rows of masked tokens may hold anything.

    Example
        >>> hidden, head = torch.randn(2, 8, 64, requires_grad=True), torch.randn(1000, 64)
        >>> logprobs, ids = torch.randn(2, 8, 1000).log_softmax(-1).topk(32)
        >>> sparse_distillation_loss(hidden, head, ids, logprobs, tail="bucket").backward()
    """
    contract.one_of("tail", tail, TAILS)
    options = {"ce_weight": ce_weight, "reduction": reduction, "ignore_index": ignore_index}
    contract.check_options(
        temperature=temperature, kd_weight=kd_weight, z_loss_weight=z_loss_weight, label_smoothing=0.0,
        student_logit_scale=student_logit_scale, teacher_logit_scale=1.0, student_softcap=student_softcap, teacher_softcap=None,
        vocab_mismatch="error", column_fraction=None, gradient_tolerance=None, seed=None, sweep=None, sweep_tolerance=None,
        workspace_mib=workspace_mib, **options,
    )  # fmt: skip
    contract.backend_name(backend)
    divergence = resolve(divergence)
    exponent = _exponent(temperature, teacher_temperature, tail)
    tokens = _check_tensors(student_hidden, student_weight, student_bias, teacher_ids, teacher_logprobs, teacher_tail_mass, tail)
    per_token.check(tokens, labels, token_weight, num_items, options)
    contract.check_devices(
        {
            "student_hidden": student_hidden, "student_weight": student_weight, "student_bias": student_bias, "teacher_ids": teacher_ids,
            "teacher_logprobs": teacher_logprobs, "teacher_tail_mass": teacher_tail_mass, "labels": labels, "token_weight": token_weight,
            "num_items": num_items if isinstance(num_items, Tensor) else None,
        }
    )  # fmt: skip

    dtype = contract.compute_dtype(student_hidden.dtype)
    valid, factor = per_token.factors(tokens, labels, token_weight, num_items, options, dtype, student_hidden.device)
    if labels is not None:
        labels = per_token.marked("labels", labels, valid, student_weight.shape[0])
    kd = kd_weight * temperature**2 if temperature_squared else kd_weight
    coefficients = per_token.per_term(factor.reshape(-1), kd, ce_weight, z_loss_weight)
    tensors = per_token.flat(student_hidden, student_weight, student_bias, None, None, None, labels, coefficients)
    problem = per_token.problem(tensors, divergence=divergence if kd else None, cross_entropy=ce_weight != 0, z_loss=z_loss_weight != 0)
    deferred = reduction == "none"
    total, terms, *_ = listed_entries.terms(
        *tensors[:3],
        teacher_ids.reshape(-1, teacher_ids.shape[-1]),
        teacher_logprobs.reshape(-1, teacher_ids.shape[-1]) if kd else None,
        None if teacher_tail_mass is None else teacher_tail_mass.reshape(-1),
        tensors.labels if problem.cross_entropy else None,
        tensors.coefficients,
        problem.divergence.name if kd else "",
        list(problem.divergence.parameters) if kd else [],
        tail,
        exponent,
        problem.cross_entropy,
        problem.z_loss,
        float(temperature),
        float(student_logit_scale),
        student_softcap,
        problem.d_hidden,
        problem.d_weight,
        problem.d_bias,
        labels is not None or token_weight is not None,
        contract.workspace(workspace_mib, student_hidden.device),
        backend,
        deferred,
    )
    return (tensors.coefficients * terms).sum(-1).view(tokens) if deferred else total


def _exponent(temperature, teacher_temperature, tail) -> float:
    """What p is raised to, to be of the temperature."""
    contract.finite_number("teacher_temperature", teacher_temperature, above=0, optional=True)
    if teacher_temperature is None or teacher_temperature == temperature:
        return 1.0
    if tail != "renormalise":
        raise ValueError(
            f"teacher_logprobs are of temperature {teacher_temperature:g} and the loss is of {temperature:g}: to bring them there takes "
            f"the whole distribution, of which a list has a part. Keep log-probabilities of temperature {temperature:g}, or pass "
            'tail="renormalise", which compares the list alone'
        )
    return teacher_temperature / temperature


def _check_tensors(student_hidden, student_weight, student_bias, teacher_ids, teacher_logprobs, teacher_tail_mass, tail):
    """Shape of the tokens, (...)."""
    contract.check_head("student_", student_hidden, student_weight, student_bias)
    tokens = student_hidden.shape[:-1]
    per_token.check_lists("teacher_ids", teacher_ids, tokens)
    contract.check_matrix("teacher_logprobs", teacher_logprobs)
    if teacher_logprobs.shape != teacher_ids.shape:
        raise ValueError(
            f"teacher_logprobs must have the shape of teacher_ids, {tuple(teacher_ids.shape)}, got {tuple(teacher_logprobs.shape)}"
        )
    if teacher_tail_mass is not None:
        contract.check_tokens("teacher_tail_mass", teacher_tail_mass, tokens, contract.DTYPES, "a floating-point tensor")
        if tail != "bucket":
            raise ValueError(f'teacher_tail_mass is what tail="bucket" compares, but tail is {tail!r}')
    contract.check_teacher({"teacher_logprobs": teacher_logprobs, "teacher_tail_mass": teacher_tail_mass})
    return tokens


def selected_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    token_ids: Tensor,  # (..., K)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    workspace_mib: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of several chosen tokens at each position, and of all others together, both differentiable, without logits.

    q = softmax(softcap(logit_scale · (hidden · weightᵀ + bias)) / temperature); returns (log q_id (..., K), log Σ_{v not chosen} q_v (...))
    in nats, float32 (float64 for float64 inputs), none below −10⁴. The others are summed as they are, not as 1 − Σ q_id, so that the
    second is right where next to nothing is left. What `token_logprobs` is for one id, at the same cost: 1S forward and 3S backward. For
    losses of the teacher's or the student's own top k, for instance on-policy reverse KL, whose teacher is asked for ids that the student
    chose.

    Arguments
        token_ids (..., K) int64: none twice in a row; -1 where a row has fewer than K, which gives 0. A row of none gives 0 for the others,
            too, and costs nothing. On CPU ids out of range raise ValueError, elsewhere their row is NaN.
        All others as in `token_logprobs`.

    Example
        >>> hidden, head = torch.randn(2, 8, 64, requires_grad=True), torch.randn(1000, 64)
        >>> top = (hidden @ head.T).topk(16).indices
        >>> logprobs, rest = selected_logprobs(hidden, head, top)
        >>> (logprobs.exp() * logprobs).sum().backward()
    """
    per_token.check_logprobs(hidden, weight, bias, temperature, logit_scale, softcap, backend)
    per_token.check_lists("token_ids", token_ids, hidden.shape[:-1])
    contract.check_devices({"hidden": hidden, "weight": weight, "bias": bias, "token_ids": token_ids})
    workspace_mib = contract.workspace(workspace_mib, hidden.device)
    tensors = per_token.flat(hidden, weight, bias, None, None, None, None, token_ids.new_empty(0))
    problem = per_token.problem(tensors, divergence=None, cross_entropy=False, z_loss=False)
    logprobs, rest = listed_entries.logprobs(
        *tensors[:3],
        token_ids.reshape(-1, token_ids.shape[-1]),
        logit_scale / temperature,
        None if softcap is None else softcap / temperature,
        problem.d_hidden,
        problem.d_weight,
        problem.d_bias,
        workspace_mib,
        backend,
    )
    return logprobs.view(token_ids.shape), rest.view(token_ids.shape[:-1])
