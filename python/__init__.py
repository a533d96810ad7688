"""The public API of distill_kernels; `import distill_kernels` shows the same names."""

from typing import Any

from distill_kernels.api.cache.reading import TeacherCache
from distill_kernels.api.cache.writing import write_teacher_cache
from distill_kernels.api.losses.distillation import (
    DistillationLoss,
    DistillationStats,
    distillation_loss,
    distillation_loss_and_stats,
)
from distill_kernels.api.losses.logprobs import selected_logprobs, token_logprobs
from distill_kernels.api.losses.prepared_heads import PreparedHead, prepare_head
from distill_kernels.api.losses.presets import describe_preset, preset
from distill_kernels.api.losses.sparse import sparse_distillation_loss
from distill_kernels.api.measuring.diagnosis import doctor, plan
from distill_kernels.api.models.architectures import register_architecture
from distill_kernels.api.models.backbone import BackboneOutput, run_backbone
from distill_kernels.api.models.labels import next_token_labels, placeholder_ids
from distill_kernels.api.trainers.trl_mixins import TRLDistillationMixin, TRLGKDMixin

__all__ = [
    "BackboneOutput",
    "DistillationLoss",
    "DistillationStats",
    "PreparedHead",
    "TRLDistillationMixin",
    "TRLGKDMixin",
    "TeacherCache",
    "describe_preset",
    "distillation_loss",
    "distillation_loss_and_stats",
    "doctor",
    "next_token_labels",
    "placeholder_ids",
    "plan",
    "prepare_head",
    "preset",
    "register_architecture",
    "run_backbone",
    "selected_logprobs",
    "sparse_distillation_loss",
    "token_logprobs",
    "write_teacher_cache",
]


def __getattr__(name: str) -> Any:
    """Names that need a package of their own; not in __all__, so that `import *` asks for none."""
    if name == "DistillationTrainer":
        from distill_kernels.api.trainers.distillation_trainer import DistillationTrainer

        return DistillationTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
