"""Hidden states, LM heads and labels of Hugging Face causal language models, in the form distillation_loss takes.

Nothing here imports transformers except `load_causal_lm`, when it is called.
"""

import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from distill_kernels.api.models.lm_head import Head, head_of, without_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Hugging Face labels mark positions without a target by this value, whatever ignore_index a loss uses.
_HF_IGNORED = -100

# Trainer and collators put these into a batch for the model's own loss, which is never computed here.
_LOSS_ARGUMENTS = frozenset({"labels", "shift_labels", "num_items_in_batch"})


@dataclass(frozen=True)
class _LogitRecipe:
    """Names of the configuration fields which change hidden @ weight.T + bias; None where there is no such field."""

    multiply_by: str | None = None
    divide_by: str | None = None
    softcap: str | None = None


_PLAIN_ARCHITECTURES = (
    "apertus arcee bamba bloom codegen deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4 falcon gemma glm glm4 glm4_moe gpt2 "
    "gpt_bigcode gpt_neo gpt_neox gpt_oss gptj helium hunyuan_v1_dense jamba lfm2 llama ministral mistral mixtral mpt "
    "nemotron olmo olmo2 olmo3 olmoe opt phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 "
    "stablelm starcoder2"
)
# config.model_type -> recipe, as read from each architecture's forward; the tests compare every entry with model(...).logits.
_RECIPES: dict[str, _LogitRecipe] = {
    **dict.fromkeys(_PLAIN_ARCHITECTURES.split(), _LogitRecipe()),
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "nanochat", "vaultgemma"), _LogitRecipe(softcap="final_logit_softcapping")
    ),
    **dict.fromkeys(("cohere", "cohere2"), _LogitRecipe(multiply_by="logit_scale")),
    **dict.fromkeys(("granite", "granitemoe", "granitemoehybrid", "granitemoeshared"), _LogitRecipe(divide_by="logits_scaling")),
    "falcon_h1": _LogitRecipe(multiply_by="lm_head_multiplier"),
    "hyperclovax": _LogitRecipe(multiply_by="logits_scaling"),
}


@dataclass(frozen=True, eq=False)
class BackboneOutput:
    """What a causal language model multiplies to get its logits: softcap(logit_scale * (hidden @ weight.T + bias)).

    hidden (B, S, D) comes after the final norm; weight (V, D) and bias (V,) or None are the LM head's own parameters; logit_scale
    is a float and softcap the cap of cap * tanh(logits / cap), or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def as_student(self) -> dict[str, Any]:
        """The student's keyword arguments of distillation_loss; gradients flow into hidden, weight and bias."""
        return {f"student_{name}": value for name, value in vars(self).items()}

    def as_teacher(self) -> dict[str, Any]:
        """The teacher's keyword arguments of distillation_loss; its tensors are detached and still share memory with the model."""
        return {f"teacher_{name}": value.detach() if isinstance(value, Tensor) else value for name, value in vars(self).items()}


def run_backbone(model: nn.Module, **batch: Any) -> BackboneOutput:
    """Run a transformers causal language model up to its final norm and return what its logits are made of.

        softcap(logit_scale * (hidden @ weight.T + bias)) == model(**batch).logits

    No logits and no loss are computed: `labels` in the batch is ignored, and no key-value cache is kept. Architectures differ in
    logit_scale, bias and softcap; the ones covered are listed by config.model_type in this module.

    Args:
        model: a causal language model of transformers, unwrapped, with a plain torch.nn.Linear LM head (tied embeddings are fine); or a
            PeftModel of one, whose adapters may be anywhere, and on the LM head LoRA: see `lm_head.Head.widened` for what that costs.
        batch: the model's inputs, such as input_ids (B, S) int64, attention_mask (B, S) and position_ids (B, S).

    Returns:
        BackboneOutput with hidden (B, S, D) and weight (V, D), whose dtypes are the model's; D + r for LoRA of rank r on the LM head.

    Raises:
        TypeError: the model is wrapped (DDP, FSDP, torch.compile), is no causal language model, or its head is not plain. Of a model
            sharded by torch.distributed.fsdp.fully_shard the head is whole inside of the model's own forward only.
        ValueError: the batch asks for logits_to_keep.
        NotImplementedError: the architecture is not covered; the message says what to pass to distillation_loss by hand.

    Example:
        >>> with torch.no_grad():
        ...     target = run_backbone(teacher, **batch)
        >>> labels = next_token_labels(batch["input_ids"], attention_mask=batch["attention_mask"])
        >>> loss = distillation_loss(**run_backbone(student, **batch).as_student(), **target.as_teacher(), labels=labels)
    """
    parts = _parts(model)
    if "logits_to_keep" in batch:
        raise ValueError("the batch has logits_to_keep, but run_backbone returns every position; drop it and slice hidden instead")
    inputs = {name: value for name, value in batch.items() if name not in _LOSS_ARGUMENTS}
    inputs.update(use_cache=False, return_dict=True)
    hidden, weight, bias = parts.head.widened(parts.model.base_model(**inputs).last_hidden_state)
    return BackboneOutput(hidden, weight, bias, parts.logit_scale, parts.softcap)


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the LM head, which may be more than the tokenizer has tokens; raises what run_backbone would, and runs nothing."""
    return _parts(model).head.weight.shape[0]


class _Parts(NamedTuple):
    """What makes a model's logits."""

    model: Any  # without peft
    head: Head
    logit_scale: float
    softcap: float | None


def _parts(model: nn.Module) -> _Parts:
    bare = without_peft(model)
    return _Parts(bare, head_of(bare), *_scale_and_softcap(bare.config))


def _scale_and_softcap(config: Any) -> tuple[float, float | None]:
    model_type = getattr(config, "model_type", None)
    if model_type not in _RECIPES:
        raise NotImplementedError(
            f"run_backbone does not know how model_type {model_type!r} makes logits; read its forward and call distillation_loss with, for "
            "each of student and teacher, *_hidden = the hidden states after the final norm (B, S, D), *_weight = the LM head's weight "
            "(V, D), *_bias = its bias (V,) or None, *_logit_scale = the number that multiplies hidden @ weight.T + bias (1.0 if none) "
            "and *_softcap = cap where it ends in cap * tanh(logits / cap) (None if not)"
        )
    recipe = _RECIPES[model_type]
    logit_scale = 1.0 if recipe.multiply_by is None else float(getattr(config, recipe.multiply_by))
    if recipe.divide_by is not None:
        logit_scale /= float(getattr(config, recipe.divide_by))
    softcap = None if recipe.softcap is None else getattr(config, recipe.softcap)
    return logit_scale, None if softcap is None else float(softcap)


def next_token_labels(
    input_ids: Tensor,
    *,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Labels with which hidden[:, t] is scored on token t + 1, in the shape of input_ids, so that hidden needs no slicing.

        out[b, t] = targets[b, t + 1], where targets is `labels` if given and input_ids otherwise; ignore_index where there is none

    There is no target at the last position; where token t or token t + 1 is padding (on either side); where labels[b, t + 1] is
    -100; and where position_ids[b, t + 1] != position_ids[b, t] + 1, which is where one packed document ends and the next begins.

    Args:
        input_ids: (B, S), integer.
        labels: (B, S), integer, not shifted, -100 where there is no target (the Hugging Face convention).
        attention_mask: (B, S), bool or integer, zero at padding.
        position_ids: (B, S) or (1, S), integer, counting up by one within a document and starting again at the next.
        ignore_index: what to write where there is no target.

    Returns:
        (B, S) int64, on the device of input_ids.

    Raises:
        ValueError: a shape or device differs from what is wanted.
        TypeError: a dtype differs from what is wanted.

    Example:
        >>> next_token_labels(torch.tensor([[5, 6, 7, 8]]), position_ids=torch.tensor([[0, 1, 0, 1]]))
        tensor([[   6, -100,    8, -100]])
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, wanted (batch, sequence)")
    batch, length = input_ids.shape
    _check_integers("input_ids", input_ids, input_ids, {(batch, length)})
    targets = input_ids
    if labels is not None:
        _check_integers("labels", labels, input_ids, {(batch, length)})
        targets = labels
    # roll brings the first column to the end, where it is never used because the last position has no target.
    targets = targets.roll(-1, dims=1).long()
    has_target = torch.arange(length, device=input_ids.device) < length - 1
    if labels is not None:
        has_target = has_target & (targets != _HF_IGNORED)
    if attention_mask is not None:
        _check_integers("attention_mask", attention_mask, input_ids, {(batch, length)}, or_bool=True)
        real = attention_mask != 0
        has_target = has_target & real & real.roll(-1, dims=1)
    if position_ids is not None:
        _check_integers("position_ids", position_ids, input_ids, {(batch, length), (1, length)})
        has_target = has_target & (position_ids.roll(-1, dims=1) == position_ids + 1)
    return torch.where(has_target, targets, ignore_index)


def _check_integers(name: str, tensor: Tensor, input_ids: Tensor, shapes: set[tuple[int, int]], or_bool: bool = False) -> None:
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted {' or '.join(map(str, sorted(shapes)))} as input_ids has")
    if tensor.is_floating_point() or tensor.is_complex() or (tensor.dtype == torch.bool and not or_bool):
        raise TypeError(f"{name} has dtype {tensor.dtype}, wanted {'bool or ' if or_bool else ''}an integer type")
    if tensor.device != input_ids.device:
        raise ValueError(f"{name} is on {tensor.device}, wanted {input_ids.device}, where input_ids is")


def load_causal_lm(path: str | Path, dtype: torch.dtype = torch.float32) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a causal language model and its tokenizer from local files, never from the network.

    Args:
        path: a Hugging Face folder (config.json, weights, tokenizer), a folder with one .gguf file, or a .gguf file.
        dtype: dtype of the model's parameters.

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
