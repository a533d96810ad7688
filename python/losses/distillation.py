"""The loss of a teacher's hidden states: what a training loop calls. Masks, reduction and autocast are done here, everything else below."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distill_kernels.api.losses import per_token, vocabulary_shards
from distill_kernels.api.losses.inputs import Inputs
from distill_kernels.api.losses.prepared_heads import PreparedHead, quantised
from distill_kernels.api.losses.vocabulary_shards import Spread
from distill_kernels.call import checks
from distill_kernels.call.options import DEFAULTS, DENSE_NAMES, Options
from distill_kernels.call.problem import STATS, Tensors
from distill_kernels.divergences import Divergence, resolve
from distill_kernels.ops import whole_vocabulary


def distillation_loss(
    student_hidden: Tensor,  # (..., D_s)
    student_weight: Tensor | PreparedHead,  # (V, D_s)
    teacher_hidden: Tensor | None,  # (..., D_t)
    teacher_weight: Tensor | PreparedHead | None,  # (V, D_t)
    labels: Tensor | None = None,  # (...)
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    temperature_squared: bool = True,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    z_loss_weight: float = 0.0,
    label_smoothing: float = 0.0,
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    token_weight: Tensor | None = None,  # (...)
    ignore_index: int = -100,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    vocab_mismatch: str = "error",
    column_fraction: float | str | None = None,
    gradient_tolerance: float | None = None,
    seed: int | None = None,
    sweep: str | None = None,
    sweep_tolerance: float | None = 0.02,
    backend: str = "auto",
    workspace_mib: int | None = None,
    process_group: Any = None,  # a torch.distributed.ProcessGroup or DeviceMesh
    sequence_parallel: bool = False,
) -> Tensor:
    """Divergence between the teacher's and the student's next-token distributions, plus cross entropy, from hidden states.

    With logits z = softcap(logit_scale · (hidden · weightᵀ + bias)), softcap(a) = cap·tanh(a/cap), p the teacher's and q the student's
    softmax of z / temperature, the loss of a token is

        kd_weight · temperature² · D(p‖q)  +  ce_weight · CE(z, label)  +  z_loss_weight · logsumexp(z)²

    after Hinton, Vinyals and Dean (2015), the last term after de Brébisson and Vincent (2016). Neither model's logits are ever held for
    more than a chunk of tokens, in float32 whatever the inputs' dtype. Gradients go to student_hidden, student_weight and
    student_bias, where they require grad; they are computed together with the loss. There are no second derivatives.

    Arguments
        student_hidden (..., D_s), student_weight (V, D_s): states after the final norm, and the LM head; float32, bfloat16, float16
            or float64, alike. Under torch.autocast they are cast as a linear layer's would be.
        teacher_hidden (..., D_t), teacher_weight (V, D_t): the same of the teacher, which must not require grad; None for both if
            kd_weight is 0.
        labels (...) int64: next tokens, already shifted. Required if ce_weight > 0, otherwise they only mask. Checked on CPU.
        divergence: a name, or for instance distill_kernels.divergences.jensen_shannon(beta=0.1).
        temperature: softens both distributions of the divergence; cross entropy and z-loss are not tempered.
        temperature_squared: multiply the divergence, value and gradient, by temperature².
        label_smoothing: of the cross entropy, as in torch.nn.functional.cross_entropy.
        student_bias, teacher_bias (V,); *_logit_scale; *_softcap: as in the formula.
        token_weight (...) float: multiplies each token's loss; it does not enter the normaliser.
        ignore_index: tokens with this label are left out of everything and cost nothing; so do tokens of weight 0.
        num_items: replaces the number of valid tokens as the normaliser of "mean", for gradient accumulation; int or 0-d tensor.
        reduction: "mean" over valid tokens, "sum", or "none": (...) per token, differentiable, at 4S + 2T instead of 3S + 1T; with a
            column_fraction still at 1S + 1T and 2 · column_fraction · S, if the columns kept for backward, 4 bytes for each and every
            token, fit in half of workspace_mib (and student_bias gets no gradient).
        vocab_mismatch: "error", or "truncate": the divergence is then over the first entries, that both have, renormalised; cross entropy
            and z-loss stay over all of the student's, which takes 3S more where it has more than the teacher.
        column_fraction: of the vocabulary that the gradient products go over: 1S + 1T and 2 · column_fraction · S in place of 3S + 1T.
            The loss stays exact, the gradients of student_hidden and student_weight become unbiased estimates (see `columns` for the
            estimator, and its sources; `DistillationStats.gradient_error` for its error), that of student_bias stays exact, but with a
            sweep. None: exact
            gradients; so where sampling would not be faster (fewer than 96 tokens, V < 8192, more than 40 % of the columns). "auto": the
            smallest of 2, 4, 8, 16 and 32 % whose predicted relative error is within gradient_tolerance, else all; chosen on the first
            chunk of tokens, for which a GPU is waited for.
        gradient_tolerance: relative error of the gradients, with column_fraction="auto" only, and required there.
        seed: of the columns drawn: int, or None to draw it from torch's generator (torch.manual_seed). One and the same int at every step
            draws by the same numbers, so that errors do not average out over steps: leave it None in training.
        sweep: "int8", or "fp8" (for GPUs; on CPU slowly, by torch): logits of the whole vocabulary are made from 8-bit products, in a
            fraction of the time and with none of them kept, and the columns of column_fraction, which is then required, are computed
            exactly and correct the sums without bias (see `quantised` for the estimator and its sources). The loss is then an estimate,
            too (`DistillationStats.divergence_error`), and so is the gradient of student_bias. Forward and reverse KL, cross entropy and
            z-loss; not label_smoothing. Pass the teacher's head through `prepare_head`, so that it is quantised once. None, or where
            sampling would not be faster: exact.
        sweep_tolerance: standard error of a token's divergence and log-sum-exp, in nats, root mean square over a chunk of tokens, above
            which the chunk's sums are computed exactly; its gradients still go over the columns. A GPU is waited for to see it, unless a
            graph is being captured. None: never, unless on CPU the errors are not even finite numbers.
        process_group: torch.distributed's group, or a device mesh of one dimension, whose ranks each have some rows of the vocabulary,
            in the order of ranks: student_weight, teacher_weight and biases are this rank's rows, of the same entries for both models,
            and everything else, labels of the whole vocabulary included, is the same on all ranks (see `shards`). Every rank gets the loss
            and the whole gradient of student_hidden, and those of its rows. Heads that are DTensors with rows sharded say it themselves.
            All ranks have to call, and to go backward; what one was called with otherwise raises ValueError on all. Not with
            column_fraction="auto" or sweep. Columns are sampled on each rank from its own rows.
        sequence_parallel: the tokens are divided over the ranks of process_group as well, as many on each: hidden states, labels and
            token_weight are this rank's. They are gathered, and the gradient of student_hidden is scattered while it is added up. Means
            are over all ranks' tokens; with reduction="none" and in the stats each rank gets its own. So it is for hidden states that are
            DTensors with tokens sharded.
        backend: "auto", or one of those that `doctor()` lists; a named one runs or raises.
        workspace_mib: memory for logits and all else but gradients, by default 192 on CPU and 1024 on a GPU. Larger is faster where
            heads are large.

    Returns
        float32 (float64 for float64 inputs), () or (...). If every token is masked: 0, attached to the graph, with zero gradients.

    Raises
        TypeError, ValueError: naming the argument, what was got and what was wanted. NotImplementedError: what no backend can run.

    Example
        >>> hidden, head = torch.randn(2, 8, 64, requires_grad=True), torch.randn(1000, 64)
        >>> loss = distillation_loss(hidden, head, torch.randn(2, 8, 96), torch.randn(1000, 96), temperature=2.0)
        >>> loss.backward()
    """
    inputs = Inputs(
        student_hidden=student_hidden,
        student_weight=student_weight,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        labels=labels,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        token_weight=token_weight,
        num_items=num_items,
    )
    options = Options(
        divergence=resolve(divergence),
        temperature=temperature,
        temperature_squared=temperature_squared,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        z_loss_weight=z_loss_weight,
        label_smoothing=label_smoothing,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        ignore_index=ignore_index,
        reduction=reduction,
        vocab_mismatch=vocab_mismatch,
        column_fraction=column_fraction,
        gradient_tolerance=gradient_tolerance,
        seed=seed,
        sweep=sweep,
        sweep_tolerance=sweep_tolerance,
        backend=backend,
        workspace_mib=workspace_mib,
        process_group=process_group,
        sequence_parallel=sequence_parallel,
    )
    return _over_ranks(inputs, options, stats=False)[0]


@dataclass(frozen=True)
class DistillationStats:
    """Detached diagnostics of every token, (...) each, 0 where a token is masked; float32 but for `valid`."""

    divergence: Tensor  # D(p‖q) in nats, without temperature² or weights
    cross_entropy: Tensor  # −log q_label of the untempered student, not smoothed; 0 without labels
    student_entropy: Tensor  # of the tempered distribution, in nats
    teacher_entropy: Tensor
    top1_agreement: Tensor  # 1 where both models have the same most probable token
    tail_mass: Tensor  # student's probability on tokens to which the teacher gives less than 1e-4
    valid: Tensor  # bool: not masked, and of non-zero weight
    # (2,), not of a token: predicted relative error of d_student_hidden and d_student_weight, 0 where the tolerance took all columns; None
    # where no columns were to be sampled, or sampling did not pay, or reduction="none", whose gradients are of the upstream to come.
    gradient_error: Tensor | None = None
    # Of a quantised sweep, else None: standard errors in nats, (...), 0 where a token's chunk was computed exactly after all, as
    # `recomputed` () chunks were; infinite where rounding leaves none to be trusted. Entropies are then corrected sums like the losses, but
    # tail mass is estimated from the kept columns alone, and top-1 agreement is of them: a little too high if they are few.
    divergence_error: Tensor | None = None
    logsumexp_error: Tensor | None = None  # of the untempered student, and so of the cross entropy
    recomputed: Tensor | None = None

    def mean(self) -> dict[str, Tensor]:
        """Means over valid tokens, 0-d tensors."""
        count = self.valid.sum().clamp(min=1)
        return {name: getattr(self, name).sum() / count for name in STATS}


def distillation_loss_and_stats(
    student_hidden: Tensor,  # (..., D_s)
    student_weight: Tensor | PreparedHead,  # (V, D_s)
    teacher_hidden: Tensor | None,  # (..., D_t)
    teacher_weight: Tensor | PreparedHead | None,  # (V, D_t)
    labels: Tensor | None = None,  # (...)
    *,
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    token_weight: Tensor | None = None,  # (...)
    num_items: int | Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, DistillationStats]:
    """`distillation_loss` with the same arguments, and per-token diagnostics from the same pass.

    Example
        >>> hidden, head = torch.randn(2, 8, 64, requires_grad=True), torch.randn(1000, 64)
        >>> loss, stats = distillation_loss_and_stats(hidden, head, torch.randn(2, 8, 96), torch.randn(1000, 96))
        >>> agreement = stats.mean()["top1_agreement"]
    """
    inputs = Inputs(
        student_hidden, student_weight, teacher_hidden, teacher_weight, labels, student_bias, teacher_bias, token_weight, num_items
    )  # fmt: skip
    loss, stats = _over_ranks(inputs, Options.of(**options), stats=True)
    assert stats is not None
    return loss, stats


class DistillationLoss(nn.Module):
    """`distillation_loss` as a module: options at construction, tensors at the call.

    options: the frozen `Options` that they made. To change one, for instance a scheduled temperature, replace them:
    `loss_fn.options = dataclasses.replace(loss_fn.options, temperature=1.5)`.

    Example
        >>> loss_fn = DistillationLoss(divergence="reverse_kl", temperature=2.0)
        >>> loss = loss_fn(torch.randn(8, 64), torch.randn(1000, 64), torch.randn(8, 96), torch.randn(1000, 96))
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = Options.of(**options)

    def forward(
        self,
        student_hidden: Tensor,  # (..., D_s)
        student_weight: Tensor | PreparedHead,  # (V, D_s)
        teacher_hidden: Tensor | None,  # (..., D_t)
        teacher_weight: Tensor | PreparedHead | None,  # (V, D_t)
        labels: Tensor | None = None,  # (...)
        *,
        student_bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V,)
        token_weight: Tensor | None = None,  # (...)
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        """See `distillation_loss`."""
        inputs = Inputs(
            student_hidden, student_weight, teacher_hidden, teacher_weight, labels, student_bias, teacher_bias, token_weight, num_items
        )  # fmt: skip
        return _over_ranks(inputs, self.options, stats=False)[0]

    def extra_repr(self) -> str:
        given = {name: getattr(self.options, name) for name in DENSE_NAMES}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value != getattr(DEFAULTS, name))


def _over_ranks(inputs: Inputs, options: Options, *, stats: bool) -> tuple[Tensor, DistillationStats | None]:
    """`_evaluated` of this rank's part, or of all ranks' tokens."""
    inputs, spread = vocabulary_shards.localised(inputs, options)
    if not spread.tokens:
        return _evaluated(inputs, options, spread, stats)
    tokens = inputs.tokens
    loss, made = _evaluated(vocabulary_shards.all_tokens(inputs, spread.group), options, spread, stats)
    if loss.dim():
        loss = vocabulary_shards.own_tokens(loss, tokens, spread.group)
    if made is None:
        return loss, None
    own = {name: value for name, value in vars(made).items() if value is not None and value.dim() == 1 and name != "gradient_error"}
    return loss, replace(made, **{name: vocabulary_shards.own_tokens(value, tokens, spread.group) for name, value in own.items()})


def _evaluated(inputs: Inputs, options: Options, spread: Spread, stats: bool) -> tuple[Tensor, DistillationStats | None]:
    """(loss, DistillationStats or None): validated, reduced, everything `distillation_loss` documents."""
    resolve(options.divergence)  # refuses one whose name has another body by now
    if spread.group:
        options.check_sharded()
    inputs.check(options)
    if inputs.teacher_head is not None and len(inputs.student_head) > len(inputs.teacher_head):
        return _with_entries_of_its_own(inputs, options, spread, stats)
    return _of_one_vocabulary(inputs, options, spread, stats)


def _with_entries_of_its_own(inputs: Inputs, options: Options, spread: Spread, stats: bool) -> tuple[Tensor, DistillationStats | None]:
    """Of a student with more entries than the teacher: the divergence of the shared ones, and what is of the student alone of all."""
    teacher = inputs.teacher_head
    assert teacher is not None
    labels, alone = inputs.labels, replace(inputs, teacher_hidden=None, teacher_weight=None, teacher_bias=None)
    if labels is not None:
        valid = labels != options.ignore_index
        per_token.marked("labels", labels, valid, len(inputs.student_head))
        # In the divergence labels are a mask, and those of the student's own entries would be out of range there.
        inputs = replace(inputs, labels=torch.where(valid & (labels >= len(teacher)), 0, labels))
    asked = options.kd_weight != 0, options.ce_weight != 0 or options.z_loss_weight != 0
    # Weights of 1 where a part has none: it is then computed for its stats alone.
    kd = replace(options, ce_weight=0.0, z_loss_weight=0.0, label_smoothing=0.0, kd_weight=options.kd_weight if asked[0] else 1.0)
    others = replace(options, kd_weight=0.0, z_loss_weight=options.z_loss_weight if asked[1] else 1.0)
    losses, made = [], []
    for part, wanted, weighted in ((inputs, asked[0], kd), (alone, asked[1], others)):
        if wanted or stats:
            with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
                loss, of_part = _of_one_vocabulary(part, weighted, spread, stats)
            losses += [loss] if wanted else []
            made.append(of_part)
    total = losses[0] if len(losses) == 1 else losses[0] + losses[1]
    if not stats:
        return total, None
    shared, of_all = made
    assert shared is not None and of_all is not None
    return total, replace(shared, cross_entropy=of_all.cross_entropy, logsumexp_error=of_all.logsumexp_error)


def _of_one_vocabulary(inputs: Inputs, options: Options, spread: Spread, stats: bool) -> tuple[Tensor, DistillationStats | None]:
    prepared = inputs.student_weight, inputs.teacher_weight
    inputs = _of_shared_vocabulary(inputs, options)
    valid, factor = per_token.factors(inputs, options)
    labels = inputs.labels
    if labels is not None:
        labels = per_token.marked("labels", labels, valid, None if spread.group else len(inputs.student_head))
    has_teacher = options.kd_weight != 0 or (stats and inputs.teacher_hidden is not None)
    tensors = per_token.flat(inputs, labels, per_token.coefficients(factor, options), teacher=has_teacher)
    problem = per_token.problem(
        tensors,
        options,
        kd=has_teacher,
        cross_entropy=labels is not None and (options.ce_weight != 0 or stats),
        z_loss=options.z_loss_weight != 0,
        stats=stats,
        compact=labels is not None or inputs.token_weight is not None,
        group=spread.group,
        shares_d_hidden=spread.tokens,
    )
    options.check_sweep(problem.divergence, options.label_smoothing * options.ce_weight != 0, problem.compute_dtype)
    if problem.kept_columns:
        tensors = tensors._replace(seed=_seed(options.seed, problem.device))
    if problem.swept:
        tensors = _with_quantised_heads(tensors, options, *prepared)
    results = whole_vocabulary.run(problem, tensors)
    loss = results.total.view(inputs.tokens) if options.deferred else results.total
    if not stats:
        return loss, None
    errors = results.errors.view(*inputs.tokens, 2).unbind(-1) if problem.swept else (None, None)
    columns = dict(zip(STATS, results.stats.view(*inputs.tokens, len(STATS)).unbind(-1), strict=True))
    return loss, DistillationStats(
        **columns,
        valid=valid & (factor != 0),
        gradient_error=results.gradient_error if results.gradient_error.numel() else None,
        divergence_error=errors[0],
        logsumexp_error=errors[1],
        recomputed=results.recomputed.squeeze(0) if problem.swept else None,
    )


def _of_shared_vocabulary(inputs: Inputs, options: Options) -> Inputs:
    """The first entries of heads and biases, that both models have; heads without what was prepared of them."""
    student, teacher = inputs.student_head, inputs.teacher_head
    if teacher is None or len(student) == len(teacher):
        return replace(inputs, student_weight=student, teacher_weight=teacher)
    shared = checks.shared_vocabulary(student, teacher, options.vocab_mismatch)
    biases = {name: bias[:shared] for name in ("student_bias", "teacher_bias") if (bias := getattr(inputs, name)) is not None}
    return replace(inputs, student_weight=student[:shared], teacher_weight=teacher[:shared], **biases)


def _with_quantised_heads(tensors: Tensors, options: Options, student: Any, teacher: Any) -> Tensors:
    """The tensors with 8-bit copies of the heads, of prepared ones those that they have."""
    assert options.sweep is not None
    rows, scales = quantised(student, tensors.student_weight.detach(), options.sweep)
    tensors = tensors._replace(student_quantised=rows, student_scales=scales)
    if tensors.teacher_weight is None:
        return tensors
    rows, scales = quantised(teacher, tensors.teacher_weight.detach(), options.sweep)
    return tensors._replace(teacher_quantised=rows, teacher_scales=scales)


def _seed(seed: int | None, device: torch.device) -> Tensor:
    """The seed () int64 on the device: the one given, or drawn from torch's generator of the device."""
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    return torch.full((), seed, dtype=torch.int64, device=device)
