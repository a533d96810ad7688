"""Models and tokenizers from local files. transformers is imported when one is loaded."""

import pickle
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_causal_lm(path: str | Path, dtype: "torch.dtype | str" = torch.float32) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a causal language model and its tokenizer from local files, never from the network.

    Args:
        path: a Hugging Face folder (config.json, weights, tokenizer), a folder with one .gguf file, or a .gguf file.
        dtype: dtype of the model's parameters; "auto" is that of the weights.

    Returns:
        (model, tokenizer), the transformers objects; the model is in evaluation mode, on the CPU.

    Raises:
        ImportError: transformers, or what it needs for this kind of file, is not installed.
        FileNotFoundError: there is nothing at the path.
        ValueError: the folder is incomplete or cannot be read; the message names it and the reason.

    Example:
        >>> model, tokenizer = load_causal_lm("checkpoints/student", dtype=torch.bfloat16)
    """
    path = Path(path)
    folder, gguf_name = _find_checkpoint(path)
    try:
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(f'load_causal_lm needs transformers ({error}): pip install "distill_kernels[models]"') from error
    arguments: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf_name is not None:
        arguments["gguf_file"] = gguf_name
    # What damaged configuration, tokenizer, weight and GGUF files were seen to raise, besides the readers' own error types.
    malformed = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
    truncated = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, struct.error)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **arguments)
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, output_loading_info=True, **arguments)
    except ImportError as error:
        reason = _first_line(error)
        raise ImportError(f'{path} cannot be loaded without more packages ({reason}): pip install "distill_kernels[models]"') from error
    except (*malformed, *truncated, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{path} cannot be loaded as a causal language model: {_first_line(error)}") from error
    model, report = loaded
    # transformers only warns about absent weights and fills them with random numbers, which would be distilled from in silence.
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{path} has no weights for {len(missing)} of the parameters which its config.json asks for, first {missing[0]}")
    return model, tokenizer


def _find_checkpoint(path: Path) -> tuple[Path, str | None]:
    """The folder to load from, and the name of the GGUF file in it or None for Hugging Face weights."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a file that is not a .gguf, wanted a model folder or a .gguf file")
        return path.parent, path.name
    if not path.is_dir():
        raise FileNotFoundError(f"there is no model folder or .gguf file at {path}, and load_causal_lm downloads nothing")
    names = sorted(entry.name for entry in path.iterdir())
    has_weights = any(name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")) for name in names)
    if has_weights:
        if "config.json" not in names:
            raise ValueError(f"{path} has weights but no config.json, wanted a complete Hugging Face model folder")
        return path, None
    gguf_names = [name for name in names if name.endswith(".gguf")]
    if len(gguf_names) > 1:
        raise ValueError(f"{path} has {len(gguf_names)} .gguf files, wanted one; pass the path of the file itself")
    if not gguf_names:
        raise ValueError(f"{path} has no weights, wanted config.json with .safetensors or .bin files, or one .gguf file")
    return path, gguf_names[0]


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
