"""Whether the ids of two models mean the same tokens, as far as their tokenizers are known."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def difference(teacher: "PreTrainedTokenizerBase", student: "PreTrainedTokenizerBase", shared: int | None = None) -> str | None:
    """In words, how two tokenizers contradict each other; None: they do not. shared: of the ids below it alone.

    A token that one of them has and the other has not is no contradiction, unless the other has given its id to another token: heads
    have spare rows, which successors of a model use.
    """
    tokens = [{index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (teacher, student)]
    both = [index for index in tokens[0].keys() & tokens[1].keys() if shared is None or index < shared]
    differing = sorted(index for index in both if tokens[0][index] != tokens[1][index])
    if not differing:
        return None
    first = differing[0]
    return f"differ in {len(differing)} tokens (first id {first}: the teacher's {tokens[0][first]!r}, the student's {tokens[1][first]!r})"


def tokenizer_of(model: Any) -> "PreTrainedTokenizerBase | None":
    """That of the local folder that a model was loaded from; None where there is none, or it cannot be read."""
    folder = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    if not folder or not Path(folder).is_dir() or not any(Path(folder).glob("tokenizer*")):
        return None
    from transformers import AutoTokenizer

    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, TypeError, LookupError):
        return None  # what is known of it is not enough to compare anything
    return found
