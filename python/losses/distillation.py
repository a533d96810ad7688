"""The losses: what a training loop calls. Flattening, masks, reduction and autocast are done here, everything else below."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill_kernels.api.losses import per_token, prepared_heads, vocabulary_shards
from distill_kernels.call import problem as contract
from distill_kernels.call.worthwhile import FRACTIONS
from distill_kernels.divergences import STUDENT_ENTROPY, resolve
from distill_kernels.estimators import quantised as sweeps
from distill_kernels.ops import whole_vocabulary


def distillation_loss(
    student_hidden: Tensor,  # (..., D_s)
    student_weight: Tensor | prepared_heads.PreparedHead,  # (V, D_s)
    teacher_hidden: Tensor | None,  # (..., D_t)
    teacher_weight: Tensor | prepared_heads.PreparedHead | None,  # (V, D_t)
    labels: Tensor | None = None,  # (...)
    *,
    divergence="forward_kl",
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
    process_group=None,
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
        vocab_mismatch: "error", or "truncate" to the shared prefix of the vocabularies, renormalised.
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
    return _over_ranks(**locals(), stats=False)[0]


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
        return {name: getattr(self, name).sum() / count for name in contract.STATS}


def distillation_loss_and_stats(*args, **options) -> tuple[Tensor, DistillationStats]:
    """`distillation_loss` with the same arguments, and per-token diagnostics from the same pass.

    Example
        >>> hidden, head = torch.randn(2, 8, 64, requires_grad=True), torch.randn(1000, 64)
        >>> loss, stats = distillation_loss_and_stats(hidden, head, torch.randn(2, 8, 96), torch.randn(1000, 96))
        >>> agreement = stats.mean()["top1_agreement"]
    """
    call = SIGNATURE.bind(*args, **options)
    call.apply_defaults()
    return _over_ranks(**call.arguments, stats=True)


SIGNATURE = inspect.signature(distillation_loss)


class DistillationLoss(nn.Module):
    """`distillation_loss` as a module: options at construction, tensors at the call.

    Example
        >>> loss_fn = DistillationLoss(divergence="reverse_kl", temperature=2.0)
        >>> loss = loss_fn(torch.randn(8, 64), torch.randn(1000, 64), torch.randn(8, 96), torch.randn(1000, 96))
    """

    # What belongs to a batch is passed to forward.
    PER_CALL = ("student_bias", "teacher_bias", "token_weight", "num_items")

    def __init__(self, **options):
        super().__init__()
        allowed = [p.name for p in SIGNATURE.parameters.values() if p.kind is p.KEYWORD_ONLY and p.name not in self.PER_CALL]
        unknown = sorted(set(options) - set(allowed))
        if unknown:
            raise TypeError(f"DistillationLoss has no option {', '.join(unknown)}; its options are {', '.join(allowed)}")
        self.options = options
        defaults = {name: SIGNATURE.parameters[name].default for name in allowed}
        _check_options({**defaults, **options})
        vocabulary_shards.check(options.get("process_group"), options.get("sequence_parallel", False))

    def forward(self, student_hidden, student_weight, teacher_hidden, teacher_weight, labels=None, **per_call) -> Tensor:
        """per_call: student_bias, teacher_bias, token_weight, num_items; see `distillation_loss`."""
        unknown = sorted(set(per_call) - set(self.PER_CALL))
        if unknown:
            raise TypeError(f"DistillationLoss takes {', '.join(self.PER_CALL)} at the call, not {', '.join(unknown)}")
        return distillation_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, **self.options, **per_call)

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def token_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    token_ids: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
    workspace_mib: int | None = None,
    process_group=None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of chosen tokens and entropies of their distributions, both differentiable, without logits.

    q = softmax(softcap(logit_scale · (hidden · weightᵀ + bias)) / temperature); returns (log q_id (...), −Σ q·log q (...)) in nats,
    float32 (float64 for float64 inputs). Costs 1S forward and 3S backward. Arguments and errors as in `distillation_loss`; positions
    whose id is `ignore_index` give 0 and cost nothing.

    Example
        >>> hidden, head = torch.randn(2, 8, 64, requires_grad=True), torch.randn(1000, 64)
        >>> logprobs, entropies = token_logprobs(hidden, head, torch.randint(1000, (2, 8)))
        >>> (-logprobs - 0.01 * entropies).mean().backward()
    """
    local, spread = vocabulary_shards.localised({"student_weight": weight, "student_bias": bias}, process_group, False)
    weight, bias = local["student_weight"], local["student_bias"]
    per_token.check_logprobs(hidden, weight, bias, temperature, logit_scale, softcap, backend)
    contract.integer("ignore_index", ignore_index)
    workspace_mib = contract.workspace(workspace_mib, hidden.device)
    contract.check_tokens("token_ids", token_ids, hidden.shape[:-1], (torch.int64,), "int64")
    contract.check_devices({"hidden": hidden, "weight": weight, "bias": bias, "token_ids": token_ids})
    valid = token_ids != ignore_index
    token_ids = per_token.marked("token_ids", token_ids, valid, None if spread.group else weight.shape[0])
    coefficients = per_token.per_term(valid.reshape(-1), 1.0, 1.0, 0.0)
    tensors = per_token.flat(hidden, weight, bias, None, None, None, token_ids, coefficients)
    problem = per_token.problem(
        tensors,
        divergence=STUDENT_ENTROPY,
        cross_entropy=True,
        z_loss=False,
        # z / temperature, for cap/τ · tanh((scale/τ)·a / (cap/τ)) = softcap(scale·a) / τ.
        student_logit_scale=logit_scale / temperature,
        student_softcap=None if softcap is None else softcap / temperature,
        compact=True,
        group=spread.group,
        workspace_mib=workspace_mib,
    )
    terms = whole_vocabulary.run(problem, tensors, backend=backend, deferred=True).terms
    terms = terms * coefficients  # so that no gradient reaches a masked position, whatever the caller does with its 0
    return -terms[:, 1].view(token_ids.shape), terms[:, 0].view(token_ids.shape)


def _check_options(options):
    divergence = resolve(options["divergence"])
    if not isinstance(options["temperature_squared"], bool):
        raise TypeError(f"temperature_squared must be True or False, got {options['temperature_squared']!r}")
    contract.backend_name(options["backend"])
    names = inspect.signature(contract.check_options).parameters
    contract.check_options(**{name: options[name] for name in names})
    sweeps.check(options["sweep"], divergence if options["kd_weight"] else None, options["label_smoothing"] * options["ce_weight"] != 0)


def _over_ranks(process_group, sequence_parallel, stats, **arguments):
    """`_distillation_loss` of this rank's part, or of all ranks' tokens."""
    arguments, spread = vocabulary_shards.localised(arguments, process_group, sequence_parallel)
    if not spread.tokens:
        return _distillation_loss(**arguments, spread=spread, stats=stats)
    tokens = arguments["student_hidden"].shape[:-1]
    loss, made = _distillation_loss(**vocabulary_shards.all_tokens(arguments, spread.group), spread=spread, stats=stats)

    def own(values):
        of_tokens = values is not None and values.dim() == 1 and values is not made.gradient_error
        return vocabulary_shards.own_tokens(values, tokens, spread.group) if of_tokens else values

    if loss.dim():
        loss = vocabulary_shards.own_tokens(loss, tokens, spread.group)
    return loss, DistillationStats(**{name: own(value) for name, value in vars(made).items()}) if stats else None


def _distillation_loss(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels, *, student_bias, teacher_bias, token_weight, num_items, stats,
    spread, **options,
):  # fmt: skip
    """(loss, DistillationStats or None): validated, reduced, everything `distillation_loss` documents."""
    _check_options(options)
    if spread.group:
        contract.check_sharded(options["column_fraction"], options["sweep"], options["vocab_mismatch"])
    prepared = student_weight, teacher_weight
    student_weight, teacher_weight = map(prepared_heads.weight_of, prepared)
    tokens = _check_tensors(
        student_hidden, student_weight, teacher_hidden, teacher_weight, labels, student_bias, teacher_bias, token_weight, num_items, options
    )
    kd, ce, z_loss = (options[name] for name in ("kd_weight", "ce_weight", "z_loss_weight"))
    if teacher_weight is not None and student_weight.shape[0] != teacher_weight.shape[0]:
        shared = contract.shared_vocabulary(student_weight, teacher_weight, options["vocab_mismatch"])
        student_weight, teacher_weight = student_weight[:shared], teacher_weight[:shared]
        student_bias, teacher_bias = (None if bias is None else bias[:shared] for bias in (student_bias, teacher_bias))

    dtype = per_token.compute_dtype(student_hidden, teacher_hidden)
    valid, factor = per_token.factors(tokens, labels, token_weight, num_items, options, dtype, student_hidden.device)
    if labels is not None:
        labels = per_token.marked("labels", labels, valid, None if spread.group else student_weight.shape[0])
    if options["temperature_squared"]:
        kd = kd * options["temperature"] ** 2
    coefficients = per_token.per_term(factor.reshape(-1), kd, ce, z_loss)

    has_teacher = kd != 0 or (stats and teacher_hidden is not None)
    tensors = per_token.flat(
        student_hidden, student_weight, student_bias,
        *((teacher_hidden, teacher_weight, teacher_bias) if has_teacher else (None, None, None)), labels, coefficients,
    )  # fmt: skip
    problem = per_token.problem(
        tensors,
        divergence=resolve(options["divergence"]) if has_teacher else None,
        cross_entropy=labels is not None and (ce != 0 or stats),
        z_loss=z_loss != 0,
        stats=stats,
        column_fraction=FRACTIONS[-1] if options["column_fraction"] == "auto" else options["column_fraction"] or 0.0,
        gradient_tolerance=options["gradient_tolerance"] or 0.0,
        sweep=options["sweep"] or "",
        sweep_tolerance=float("inf") if options["sweep_tolerance"] is None else options["sweep_tolerance"],
        compact=labels is not None or token_weight is not None,
        group=spread.group,
        shares_d_hidden=spread.tokens,
        **{
            name: options[name]
            for name in (
                "temperature", "label_smoothing", "student_logit_scale", "teacher_logit_scale", "student_softcap", "teacher_softcap",
            )
        },
        workspace_mib=contract.workspace(options["workspace_mib"], student_hidden.device),
    )  # fmt: skip
    deferred = options["reduction"] == "none"
    sweeps.check(problem.sweep, problem.divergence, problem.label_smoothing * ce != 0, problem.compute_dtype)
    if problem.kept_columns:
        tensors = tensors._replace(seed=_seed(options["seed"], student_hidden.device))
    if problem.swept:
        for prefix, head in zip(("student", "teacher"), prepared, strict=True):
            weight = getattr(tensors, f"{prefix}_weight")
            if weight is not None:
                rows, scales = prepared_heads.quantised(head, weight.detach(), problem.sweep)
                tensors = tensors._replace(**{f"{prefix}_quantised": rows, f"{prefix}_scales": scales})
    results = whole_vocabulary.run(problem, tensors, backend=options["backend"], deferred=deferred)
    loss = results.total.view(tokens) if deferred else results.total
    if not stats:
        return loss, None
    errors = results.errors.view(*tokens, 2).unbind(-1) if problem.swept else (None, None)
    return loss, DistillationStats(
        *results.stats.view(*tokens, len(contract.STATS)).unbind(-1),
        valid=valid & (factor != 0),
        gradient_error=results.gradient_error if results.gradient_error.numel() else None,
        divergence_error=errors[0],
        logsumexp_error=errors[1],
        recomputed=results.recomputed.squeeze(0) if problem.swept else None,
    )


def _seed(seed, device):
    """The seed () int64 on the device: the one given, or drawn from torch's generator of the device."""
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    return torch.full((), seed, dtype=torch.int64, device=device)


def _check_tensors(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels, student_bias, teacher_bias, token_weight, num_items, options
):
    """Shape of the tokens, (...), after every check of the tensors against each other."""
    contract.check_head("student_", student_hidden, student_weight, student_bias)
    tokens = student_hidden.shape[:-1]
    if (teacher_hidden is None) != (teacher_weight is None) or (teacher_hidden is None and options["kd_weight"] != 0):
        raise TypeError("teacher_hidden and teacher_weight must be tensors, or both None with kd_weight=0")
    if teacher_hidden is None and teacher_bias is not None:
        raise TypeError("teacher_bias was passed without teacher_hidden and teacher_weight")
    if teacher_hidden is not None:
        contract.check_head("teacher_", teacher_hidden, teacher_weight, teacher_bias)
        if teacher_hidden.shape[:-1] != tokens:
            raise ValueError(
                f"student_hidden has tokens of shape {tuple(tokens)} but teacher_hidden {tuple(teacher_hidden.shape[:-1])}; "
                "both models must have read the same tokens"
            )
        contract.shared_vocabulary(student_weight, teacher_weight, options["vocab_mismatch"])
        contract.check_teacher({"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias})
    per_token.check(tokens, labels, token_weight, num_items, options)
    contract.check_devices(
        {
            "student_hidden": student_hidden, "student_weight": student_weight, "student_bias": student_bias,
            "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias,
            "labels": labels, "token_weight": token_weight, "num_items": num_items if isinstance(num_items, Tensor) else None,
        }
    )  # fmt: skip
    return tokens
