"""What a loss is asked for beside its tensors: one frozen object, checked when it is made, which everything below takes whole.

`distillation_loss` says what each option means. A new one is a field here, with its check, and an argument of the public functions
that offer it; kernels read it as `problem.options.NAME`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed

from distill_kernels.call import checks
from distill_kernels.divergences import Divergence, resolve

REDUCTIONS = ("mean", "sum", "none")
SWEEPS = (None, "int8", "fp8")
VOCAB_MISMATCH = ("error", "truncate")
TAILS = ("bucket", "renormalise", "ignore")  # what is done with entries that a teacher does not list; see `listed`


def _front(default: Any) -> Any:
    """A field whose part is done before the kernels are called: they never see it."""
    return dataclasses.field(default=default, metadata={"front": True})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Raises TypeError, ValueError or NotImplementedError, in words, for what is not of the contract or not to be had."""

    divergence: Divergence = resolve("forward_kl")
    temperature: float = 1.0
    temperature_squared: bool = _front(True)
    kd_weight: float = _front(1.0)
    ce_weight: float = _front(0.0)
    z_loss_weight: float = _front(0.0)
    label_smoothing: float = 0.0
    student_logit_scale: float = 1.0
    teacher_logit_scale: float = 1.0
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    ignore_index: int = _front(-100)
    reduction: str = _front("mean")
    vocab_mismatch: str = _front("error")
    tail: str | None = None  # of entries that a teacher does not list; None: it has no lists
    teacher_temperature: float | None = None  # of the lists' log-probabilities; None: `temperature`
    column_fraction: float | str | None = None
    gradient_tolerance: float | None = None
    seed: int | None = _front(None)
    sweep: str | None = None
    sweep_tolerance: float | None = 0.02
    backend: str = "auto"
    workspace_mib: int | None = None
    process_group: Any = _front(None)  # a torch.distributed.ProcessGroup or DeviceMesh
    sequence_parallel: bool = _front(False)

    @classmethod
    def of(cls, *, divergence: str | Divergence = "forward_kl", **others: Any) -> Options:
        """Those of `distillation_loss`, by name. TypeError for others, with what there is."""
        unknown = [name for name in others if name not in DENSE_NAMES]
        if unknown:
            raise TypeError(f"the loss has no option {', '.join(unknown)}; its options are {', '.join(DENSE_NAMES)}")
        return cls(divergence=resolve(divergence), **others)

    def __post_init__(self) -> None:
        if not isinstance(self.divergence, Divergence):
            raise TypeError(f"divergence must be a Divergence, got {type(self.divergence).__name__}")
        if not isinstance(self.temperature_squared, bool):
            raise TypeError(f"temperature_squared must be True or False, got {self.temperature_squared!r}")
        if not isinstance(self.backend, str):
            raise TypeError(f"backend must be a name, got {type(self.backend).__name__}")
        self._check_numbers()
        checks.one_of("reduction", self.reduction, REDUCTIONS)
        checks.one_of("vocab_mismatch", self.vocab_mismatch, VOCAB_MISMATCH)
        checks.integer("ignore_index", self.ignore_index)
        if self.workspace_mib is not None:
            checks.integer("workspace_mib", self.workspace_mib, least=1)
        self._check_list()
        self._check_columns()
        self._check_group()
        smoothed = self.label_smoothing * self.ce_weight != 0
        self.check_sweep(self.divergence if self.kd_weight else None, smoothed)
        if not torch.compiler.is_compiling():
            self._make_plain()

    def _make_plain(self) -> None:
        """Numbers of NumPy, members of an Enum and the like become Python's own: 2 and 2.0 are one temperature."""
        for name in FLOAT_NAMES:
            value = getattr(self, name)
            if type(value) is not float and isinstance(value, (int, float)):
                object.__setattr__(self, name, float(value))
        for name in ENGINE_NAMES:
            value = getattr(self, name)
            if type(value) is not str and isinstance(value, str):
                object.__setattr__(self, name, str.__str__(value))
            elif type(value) is not int and isinstance(value, int):
                object.__setattr__(self, name, int(value))

    def _check_numbers(self) -> None:
        checks.finite_number("temperature", self.temperature, above=0)
        checks.finite_number("kd_weight", self.kd_weight, least=0)
        checks.finite_number("ce_weight", self.ce_weight, least=0)
        checks.finite_number("z_loss_weight", self.z_loss_weight, least=0)
        if self.kd_weight == self.ce_weight == self.z_loss_weight == 0:
            raise ValueError("kd_weight, ce_weight and z_loss_weight are all 0: there is nothing to compute")
        checks.finite_number("label_smoothing", self.label_smoothing, least=0, most=1)
        checks.finite_number("student_logit_scale", self.student_logit_scale)
        checks.finite_number("teacher_logit_scale", self.teacher_logit_scale)
        checks.finite_number("student_softcap", self.student_softcap, above=0, optional=True)
        checks.finite_number("teacher_softcap", self.teacher_softcap, above=0, optional=True)

    def _check_list(self) -> None:
        checks.one_of("tail", self.tail, (None, *TAILS))
        checks.finite_number("teacher_temperature", self.teacher_temperature, above=0, optional=True)
        if self.list_exponent != 1.0 and self.tail != "renormalise":
            raise ValueError(
                f"teacher_logprobs are of temperature {self.teacher_temperature:g} and the loss is of {self.temperature:g}: to bring them "
                f"there takes the whole distribution, of which a list has a part. Keep log-probabilities of temperature "
                f'{self.temperature:g}, or pass tail="renormalise", which compares the list alone'
            )

    def _check_columns(self) -> None:
        if self.seed is not None:
            checks.integer("seed", self.seed, least=0)
            if self.seed >= 2**63:
                raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if self.column_fraction == "auto":
            checks.finite_number("gradient_tolerance", self.gradient_tolerance, above=0)
        elif self.gradient_tolerance is not None:
            raise ValueError(f'gradient_tolerance is for column_fraction="auto", but column_fraction is {self.column_fraction!r}')
        elif self.column_fraction is not None:
            checks.finite_number("column_fraction", self.column_fraction, above=0, most=1)
        checks.one_of("sweep", self.sweep, SWEEPS)
        checks.finite_number("sweep_tolerance", self.sweep_tolerance, above=0, optional=True)
        if self.sweep is not None and (self.column_fraction is None or self.column_fraction == "auto"):
            raise ValueError(
                f"sweep={self.sweep!r} is corrected by the columns that are computed exactly: pass column_fraction=0.08 or another number, "
                f"got {self.column_fraction!r}"
            )

    def _check_group(self) -> None:
        group = self.process_group
        if not isinstance(self.sequence_parallel, bool):
            raise TypeError(f"sequence_parallel must be True or False, got {self.sequence_parallel!r}")
        if is_mesh(group) and group.ndim != 1:
            raise ValueError(
                f"process_group is a device mesh of {group.ndim} dimensions, wanted the one that the vocabulary is divided over, for "
                'instance mesh["vocabulary"]'
            )
        is_group = distributed.is_available() and isinstance(group, distributed.ProcessGroup)
        if group is not None and not is_mesh(group) and not is_group:
            raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or a device mesh, or None, got {type(group).__name__}")

    def check_sweep(self, divergence: Divergence | None, smoothed: bool, dtype: torch.dtype = torch.float32) -> None:
        """Raises NotImplementedError where a sweep was asked for, and its sums could not be corrected (`estimators.quantised`): those of a
        divergence, None: there is none; of a cross entropy that is `smoothed`; in a compute dtype."""
        if self.sweep is None:
            return
        if divergence is not None and not divergence.one_pass:
            reason = (
                f"{divergence} is summed over log-probabilities, which a sweep does not know before its end; forward_kl and reverse_kl "
                "can be renormalised afterwards"
            )
        elif smoothed:
            reason = "label_smoothing sums the log-probabilities of the whole vocabulary alike, which a few columns cannot correct"
        elif dtype is not torch.float32:
            reason = "float64 inputs want float64, not 8 bits"
        else:
            return
        raise NotImplementedError(f"sweep={self.sweep!r}: {reason}; pass None for the exact one")

    def check_sharded(self) -> None:
        """Raises NotImplementedError for options that need the whole vocabulary on one rank."""
        if self.column_fraction == "auto":
            raise NotImplementedError('column_fraction="auto" is not available for a vocabulary in shards; pass a number')
        if self.sweep is not None:
            raise NotImplementedError("a quantised sweep is not available for a vocabulary in shards; pass sweep=None")
        if self.vocab_mismatch != "error":
            raise NotImplementedError('vocab_mismatch="truncate" is not available for a vocabulary in shards; truncate the heads before')

    @property
    def weight_of_divergence(self) -> float:
        return self.kd_weight * self.temperature**2 if self.temperature_squared else self.kd_weight

    @property
    def deferred(self) -> bool:
        """Whether gradients are made in backward, which knows what each token's are worth."""
        return self.reduction == "none"

    @property
    def list_exponent(self) -> float:
        """What listed probabilities are raised to, to be of the loss's temperature."""
        if self.teacher_temperature is None or self.teacher_temperature == self.temperature:
            return 1.0
        return self.teacher_temperature / self.temperature


def is_mesh(group: Any) -> bool:
    return distributed.is_available() and isinstance(group, distributed.DeviceMesh)


FLOAT_NAMES = tuple(field.name for field in dataclasses.fields(Options) if "float" in str(field.type))
# Those that the kernels see.
ENGINE_NAMES = tuple(field.name for field in dataclasses.fields(Options) if not field.metadata.get("front"))
DEFAULTS = Options()
DENSE_NAMES = tuple(field.name for field in dataclasses.fields(Options) if field.name not in ("tail", "teacher_temperature"))
