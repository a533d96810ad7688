"""The models that a trainer is given: loaded where they are folders, and compared by their tokenizers where those are known."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill_kernels.api.cache.reading import TeacherCache
from distill_kernels.api.cache.token_rows import tokenizer_sha256
from distill_kernels.api.models.loading import load_causal_lm
from distill_kernels.api.models.tokenizers import difference, tokenizer_of


def loaded(name: str, given: Any, dtype: "torch.dtype | str") -> nn.Module | None:
    """A model as it was given, or from the local folder that was. Raises TypeError for anything else, and what load_causal_lm raises."""
    if given is None or isinstance(given, nn.Module):
        return given
    if isinstance(given, str | Path):
        model: nn.Module = load_causal_lm(given, dtype=dtype)[0]
        return model
    raise TypeError(f"{name} is {type(given).__name__}, wanted a causal language model of transformers, or its local folder")


def check_tokenizers(student: nn.Module, given: Any, teacher: "nn.Module | TeacherCache | None", shared: int | None) -> None:
    """Raises ValueError where ids below `shared` mean other tokens to the teacher than to the student.

    given: the student's tokenizer; without it, both are looked for in the folders that the models were loaded from.
    """
    own = given if hasattr(given, "get_vocab") else getattr(given, "tokenizer", None) or tokenizer_of(student)
    if own is None or teacher is None:
        return
    if isinstance(teacher, TeacherCache):
        kept = teacher.plan.tokenizer_sha256
        if kept is not None and kept != tokenizer_sha256(own):
            raise ValueError("the teacher cache was made of tokens of another tokenizer than the student's; make it again with this one")
        return
    others = tokenizer_of(teacher)
    words = None if others is None else difference(others, own, shared)
    if words is not None:
        raise ValueError(
            f"the tokenizers of teacher and student {words}, so their distributions cannot be compared; pass models with one vocabulary"
        )
