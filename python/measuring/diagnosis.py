"""What would run, and what it would cost, before anything runs."""

import platform
from typing import Literal

import torch

from distill_kernels import backends
from distill_kernels.call import checks
from distill_kernels.call.options import Options
from distill_kernels.call.problem import Problem, compute_dtype
from distill_kernels.divergences import Divergence, resolve
from distill_kernels.schedule.plan import Plan


def plan(
    tokens: int,
    vocabulary: int,
    student_dim: int,
    teacher_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    divergence: str | Divergence = "forward_kl",
    reduction: Literal["mean", "sum", "none"] = "mean",
    hidden_gradient: bool = True,
    weight_gradient: bool = True,
    column_fraction: float | Literal["auto"] | None = None,
    sweep: Literal["int8", "fp8"] | None = None,
    listed: int = 0,
    ranks: int = 1,
    backend: str = "auto",
    workspace_mib: int | None = None,
) -> Plan:
    """Chunks, workspace, peak memory and flops of a `distillation_loss` call with N = tokens, V = vocabulary, D_s and D_t.

    Nothing runs and nothing is allocated; `print` the result to read it. `weight_gradient=False` is a frozen head, `teacher_dim=0` a
    call without a teacher (kd_weight=0); column_fraction="auto" counts its largest choice, 32 %. listed=K is a call of
    `sparse_distillation_loss` with K entries for each token, or of `selected_logprobs` with reduction="none": teacher_dim is 0 then.
    ranks=P is the share of each rank of a process group over which the vocabulary is divided (`process_group`).

    Returns
        A `Plan`: chunk_tokens, chunks, workspace_bytes, saved_bytes (columns of dz that forward keeps for backward), quantised_bytes (of
        the heads in 8 bits, for a sweep), gradient_bytes, cast_bytes, peak_bytes (above the inputs), eager_bytes (what eager torch holds
        for the same loss, gradients left out), forward_flops, backward_flops, exchanged_bytes (that a rank receives of others).

    Raises
        ValueError if the workspace cannot hold one token's logits; NotImplementedError if no backend can run it.

    Example
        >>> print(plan(8192, 128256, 2048, 4096, dtype=torch.bfloat16))  # doctest: +SKIP
    """
    for name, value, least in (
        ("tokens", tokens, 0),
        ("vocabulary", vocabulary, 1),
        ("student_dim", student_dim, 1),
        ("teacher_dim", teacher_dim, 0),
        ("listed", listed, 0),
        ("ranks", ranks, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    checks.one_of("dtype", dtype, checks.DTYPES)
    if listed and (teacher_dim or column_fraction is not None):
        raise ValueError(
            f"listed={listed} entries take the place of the teacher's head, and are not sampled: pass teacher_dim=0 and no column_fraction"
        )
    compared = teacher_dim > 0
    options = Options(
        divergence=resolve(divergence),
        kd_weight=float(compared or listed > 0),
        z_loss_weight=float(not compared),
        reduction=reduction,
        column_fraction=column_fraction,
        gradient_tolerance=1.0 if column_fraction == "auto" else None,  # that there is one decides what is kept, not which
        sweep=sweep,
        backend=backend,
        workspace_mib=workspace_mib,
    )
    options.check_sweep(options.divergence if compared else None, False, compute_dtype(dtype))
    group = ""
    sizes: tuple[int, ...] = ()
    if ranks > 1:
        if listed:
            raise NotImplementedError("losses of listed entries are not available for a vocabulary in shards")
        options.check_sharded()
        group, sizes = "planned", tuple(vocabulary // ranks + (rank < vocabulary % ranks) for rank in range(ranks))
    problem = Problem(
        tokens=tokens,
        vocabulary=sizes[0] if sizes else vocabulary,
        student_dim=student_dim,
        teacher_dim=teacher_dim,
        student_dtype=dtype,
        teacher_dtype=dtype,
        device=torch.device(device),
        options=options,
        kd=compared,
        z_loss=not (compared or listed),
        d_hidden=hidden_gradient,
        d_weight=weight_gradient,
        deferred=options.deferred,
        listed=listed,
        group=group,
        shard_sizes=sizes,
    )
    return backends.plan(problem)


def doctor() -> dict[str, str | None]:
    """Prints what this installation can run, and why it cannot run the rest.

    Returns
        For each backend None if it runs float32 tensors on CPU or on this machine's accelerator, otherwise the reason.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = [torch.device("cpu")] + ([accelerator] if accelerator is not None else [])
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}"
    print(f"distill_kernels on {versions}, {torch.get_num_threads()} threads")
    reasons: dict[str, str | None] = {}
    for name in backends.ORDER:
        per_device = {str(device): backends.load(name).why_not(_probe(device)) for device in devices}
        for place, reason in per_device.items():
            print(f"  {name:8} {place:6} {'ready, ' + backends.load(name).describe() if reason is None else 'cannot run: ' + reason}")
        reasons[name] = next((None for reason in per_device.values() if reason is None), per_device["cpu"])
    for device in devices:
        print(f'  backend="auto" on {device} takes {backends.name_of(backends.choose(_probe(device)))}')
    return reasons


def _probe(device: torch.device) -> Problem:
    """The plainest problem there is."""
    plain = torch.float32
    return Problem(tokens=1, vocabulary=2, student_dim=1, teacher_dim=1, student_dtype=plain, teacher_dtype=plain, device=device)
