"""Time and peak memory of a loss and its gradients on shapes of one's own: this library, eager torch, and other libraries beside them."""

import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_kernels.api.losses.distillation import distillation_loss
from distill_kernels.api.measuring import loss_variants, peak_memory
from distill_kernels.api.measuring.diagnosis import plan
from distill_kernels.api.progress_bar import progress
from distill_kernels.api.user_error import UserError
from distill_kernels.divergences import Divergence, from_parameters, resolve

OURS, EAGER = "distill_kernels", "eager torch"
PEERS = {"liger": "liger-kernel", "trl": "trl"}  # and the packages that they are in
# Largest relative Frobenius error of the gradients, against eager torch in float32. Ours is held to the tight bound; others round logits
# or softmaxes to 16 bits, for which there is the wide one.
TIGHT = {"float32": 1e-4, "bfloat16": 3e-3, "float16": 1e-3}
WIDE = {"float32": 1e-4, "bfloat16": 0.2, "float16": 0.05}
LOSS_SCALE = {"float16": 2.0**14}  # or gradients of a millionth would underflow
WARM_UP = (96, 8192, 16, 16)  # tokens, vocabulary and hidden sizes


@dataclass(frozen=True)
class Settings:
    tokens: int
    vocabulary: int
    student_dim: int
    teacher_dim: int
    dtype: str = "float32"
    device: str = "cpu"
    rounds: int = 5
    memory: bool = True
    loss: Mapping[str, Any] = field(default_factory=dict)  # divergence, columns, sweep, backend, workspace of distillation_loss

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.tokens, self.vocabulary, self.student_dim, self.teacher_dim

    @property
    def divergence(self) -> Divergence:
        return resolve(self.loss.get("divergence", "forward_kl"))


def run(settings: Settings) -> dict[str, Any]:
    """Medians of rounds in which every variant has its turn, each after one step like itself; peak memory in processes of their own.

    Returns
        settings, machine, predicted_peak_bytes (of `plan`), left_out (by variant, the reason), and by variant milliseconds (of every
        round), median_ms, gradient_error (relative, against eager torch in float32; None where that was left out), peak_bytes above the
        inputs, gradients among them (None where the system does not tell).

    Raises
        UserError: what the library refuses, or gradients that are wrong, so that timing them would mean nothing.
    """
    _check(settings)
    device = torch.device(settings.device)
    try:
        predicted = plan(
            *settings.sizes, dtype=getattr(torch, settings.dtype), device=device,
            **{name: value for name, value in settings.loss.items() if name not in ("gradient_tolerance", "sweep_tolerance")},
        )  # fmt: skip
        _step(OURS, settings)(*_tensors(settings, WARM_UP))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from error
    losses, left_out = _variants(settings, predicted.eager_bytes)
    tensors = _tensors(settings, settings.sizes)
    errors = _gradient_errors(settings, losses, tensors)
    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in progress(range(settings.rounds), "rounds"):
        for name in losses:
            step = _step(name, settings)
            # A step in a training loop follows one like itself; after another's it would first be given the memory that one returned.
            for samples in ([], times[name]):
                begin = time.perf_counter()
                step(*tensors)
                _wait(device)
                samples.append(1e3 * (time.perf_counter() - begin))
    del tensors
    results: dict[str, dict[str, Any]] = {
        name: {"milliseconds": samples, "median_ms": statistics.median(samples), "gradient_error": errors.get(name)}
        for name, samples in times.items()
    }
    for name in progress(list(losses) if settings.memory else [], "memory"):
        results[name]["peak_bytes"] = peak_memory.in_own_process(__name__, name, json.dumps(_plain(settings)))
    return {
        "settings": _plain(settings),
        "machine": {
            "architecture": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "distill_kernels": version("distill_kernels"),
        },
        "predicted_peak_bytes": predicted.peak_bytes,
        "left_out": left_out,
        "variants": results,
    }  # fmt: skip


def table(report: Mapping[str, Any]) -> str:
    """What `run` returned, a line for each variant."""
    variants, settings = report["variants"], report["settings"]
    base = variants.get(EAGER, variants[OURS])["median_ms"]
    against = EAGER if EAGER in variants else OURS
    dims = f"D = {settings['student_dim']:,} / {settings['teacher_dim']:,}"
    lines = [
        f"{settings['tokens']:,} tokens × {settings['vocabulary']:,} vocabulary, {dims}, {settings['dtype']} on {settings['device']}, "
        f"{report['machine']['threads']} threads: loss and both gradients",
        f"{'':18}{'median time':>14}{'÷ ' + against:>20}{'peak memory':>16}{'gradient error':>18}",
    ]
    for name, result in variants.items():
        peak, error = result.get("peak_bytes"), result["gradient_error"]
        memory, off = "–" if peak is None else f"{peak / 2**20:,.0f} MiB", "–" if error is None else f"{error:.1e}"
        lines.append(f"{name:18}{result['median_ms']:>11,.1f} ms{result['median_ms'] / base:>20.2f}{memory:>16}{off:>18}")
    lines += [f"{name} was left out: {reason}" for name, reason in report["left_out"].items()]
    return "\n".join(lines)


def _check(settings: Settings) -> None:
    if settings.dtype not in TIGHT:
        raise UserError(f"--dtype must be one of {', '.join(TIGHT)}, got {settings.dtype}")
    if not 1 <= settings.rounds <= 10_000:
        raise UserError(f"--rounds must be a whole number of at least 1, got {settings.rounds}")
    if settings.tokens < 1 or settings.teacher_dim < 1:
        raise UserError(f"--tokens and --teacher-dim must be at least 1, got {settings.tokens} and {settings.teacher_dim}")
    device = torch.device(settings.device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device.type != "cpu" and (accelerator is None or accelerator.type != device.type):
        raise UserError(f"--device {device}: this torch sees no such device; it has cpu")


def _variants(settings: Settings, eager_bytes: int) -> tuple[list[str], dict[str, str]]:
    """(those that are measured, why others are not)."""
    found = [OURS]
    left_out: dict[str, str] = {}
    divergence = settings.divergence
    if divergence.name not in (*loss_variants.MIXTURES, "jensen_shannon"):
        reason = f"it is written for forward_kl, reverse_kl and jensen_shannon, not for {divergence}"
        return found, {EAGER: reason, "liger, trl": reason}
    free = _free_bytes(torch.device(settings.device))
    if free is not None and eager_bytes > 0.8 * free:
        left_out[EAGER] = f"its logits take {eager_bytes / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free; so nothing tells errors"
    else:
        found.append(EAGER)
    peers = loss_variants.peers(divergence)
    left_out |= {name: f"it is not installed: pip install {package}" for name, package in PEERS.items() if name not in peers}
    return found + list(peers), left_out


def _loss(name: str, settings: Settings) -> loss_variants.Loss:
    if name == OURS:
        return lambda *tensors: distillation_loss(*tensors, **settings.loss)
    if name == EAGER:
        return lambda *tensors: loss_variants.eager(*tensors, divergence=settings.divergence)
    return loss_variants.peers(settings.divergence, compiled=torch.device(settings.device).type != "cpu")[name]


def _step(name: str, settings: Settings) -> loss_variants.Step:
    return loss_variants.forward_backward(_loss(name, settings), LOSS_SCALE.get(settings.dtype, 1.0))


def _gradient_errors(settings: Settings, names: list[str], tensors: tuple[Tensor, ...]) -> dict[str, float]:
    if EAGER not in names:
        return {}
    wide = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in tensors]
    loss_variants.forward_backward(_loss(EAGER, settings))(*wide)
    truth = [tensor.grad for tensor in wide if tensor.grad is not None]
    del wide
    errors: dict[str, float] = {}
    for name in names:
        _step(name, settings)(*tensors)
        errors[name] = loss_variants.gradient_error(tensors, truth, LOSS_SCALE.get(settings.dtype, 1.0))
        bound = (TIGHT if name == OURS else WIDE)[settings.dtype]
        estimated = name == OURS and settings.loss.get("column_fraction") is not None
        if not (errors[name] <= bound or (estimated and math.isfinite(errors[name]))):
            raise UserError(f"the gradients of {name} are off by {errors[name]:.1e}, more than {bound:.0e}: not timing a wrong loss")
    return errors


def _tensors(settings: Settings, sizes: tuple[int, int, int, int]) -> tuple[Tensor, ...]:
    made = (tensor.to(settings.device, getattr(torch, settings.dtype)) for tensor in loss_variants.random_problem(*sizes))
    student_hidden, student_weight, teacher_hidden, teacher_weight = made
    return student_hidden.requires_grad_(), student_weight.requires_grad_(), teacher_hidden, teacher_weight


def _free_bytes(device: torch.device) -> int | None:
    if device.type != "cpu":
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _plain(settings: Settings) -> dict[str, Any]:
    """As it stands in JSON; `_from_plain` reads it."""
    divergence = settings.divergence
    return {**asdict(settings), "loss": {**settings.loss, "divergence": [divergence.name, list(divergence.parameters)]}}


def _from_plain(text: str) -> Settings:
    plain = json.loads(text)
    name, parameters = plain["loss"]["divergence"]
    return Settings(**{**plain, "loss": {**plain["loss"], "divergence": from_parameters(name, parameters)}})


def _measure_peak(name: str, settings: Settings) -> int | None:
    step = _step(name, settings)
    step(*_tensors(settings, WARM_UP))
    tensors = _tensors(settings, settings.sizes)
    return peak_memory.above(lambda: step(*tensors), torch.device(settings.device))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps(_measure_peak(sys.argv[2], _from_plain(sys.argv[3]))))
