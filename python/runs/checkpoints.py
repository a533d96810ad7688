"""Checkpoints of a training run, from which it goes on as if it had never stopped.

A checkpoint is a folder `checkpoint-STEP`, there whole or not at all: a model folder of transformers with its tokenizer, and

    optimizer.safetensors   the optimizer's state of every trained parameter, "exp_avg PARAMETER" and so on, and torch's generators
    run.json                the step, and what the run was asked for and read: `Run`
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distill_kernels.api.runs.output_folder import unwritable, whole_folder
from distill_kernels.api.user_error import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPTIMIZER, RUN = "optimizer.safetensors", "run.json"
GENERATORS = "generator "


def save_model(folder: Path, student: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """config.json, model.safetensors and the tokenizer; from_pretrained loads it."""
    with _system_errors():
        student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """An OSError for what safetensors makes an error of its own, a full disk for instance."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def save(
    output: Path,
    step: int,
    student: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    optimizer: torch.optim.Optimizer,
    run: Mapping[str, Any],
) -> Path:
    """Writes the checkpoint of a step, and then removes those of earlier ones."""
    from safetensors.torch import save_file

    older = checkpoints(output)
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in student.named_parameters()}
    tensors = {
        f"{quantity} {names[parameter]}": tensor.contiguous()
        for parameter, state in optimizer.state.items()
        for quantity, tensor in state.items()
    }
    tensors |= {f"{GENERATORS}{device}": state for device, state in _generators(student.device).items()}
    path = output / f"checkpoint-{step:06}"
    with whole_folder(path) as folder:
        save_model(folder, student, tokenizer)
        with _system_errors():
            save_file(tensors, folder / OPTIMIZER)
        (folder / RUN).write_text(json.dumps({"step": step, **run}, indent=1) + "\n", encoding="utf-8")
    with unwritable(output):
        for checkpoint in older:
            shutil.rmtree(checkpoint)
    return path


def checkpoints(output: Path) -> list[Path]:
    """Those that are whole, the last step's last."""
    found = output.glob("checkpoint-*") if output.is_dir() else []
    return sorted((path for path in found if re.fullmatch(r"checkpoint-\d{6,}", path.name)), key=lambda path: int(path.name[11:]))


def read_run(checkpoint: Path) -> dict[str, Any]:
    """What `save` was told of the run, and "step". Raises UserError."""
    try:
        run: dict[str, Any] = json.loads((checkpoint / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint} cannot be gone on from: {RUN}: {error}; remove the folder to begin anew") from error
    return run


def restore(checkpoint: Path, student: "PreTrainedModel", optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's state and torch's generators; the student is that of the checkpoint. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    parameters = dict(student.named_parameters())
    try:
        with safe_open(checkpoint / OPTIMIZER, "pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)
        generators = {name.removeprefix(GENERATORS): tensors.pop(name) for name in list(tensors) if name.startswith(GENERATORS)}
        for key, tensor in tensors.items():
            quantity, name = key.split(" ")
            # AdamW keeps its count of steps on the CPU.
            device = "cpu" if quantity == "step" else parameters[name].device
            optimizer.state[parameters[name]][quantity] = tensor.to(device)
        torch.set_rng_state(generators.pop("cpu"))
        for device, state in generators.items():
            torch.get_device_module(device).set_rng_state(state)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{checkpoint} cannot be gone on from: {OPTIMIZER}: {error}; remove the folder to begin anew") from error


def remove(output: Path) -> None:
    """All checkpoints, once the run is finished."""
    with unwritable(output):
        for checkpoint in checkpoints(output):
            shutil.rmtree(checkpoint)


def _generators(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states
