"""DistillationTrainer in two processes, on CPU by gloo: the same as one process with the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from trainer_processes import OPTIONS, loss_of_a_batch
from trainer_runs import curve, distillation_trainer, make_student, make_teacher, trained

from distill_kernels.api.trainers.trainer_loss import METRICS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left."""
    folder = tmp_path_factory.mktemp("processes")
    program = Path(__file__).with_name("trainer_processes.py")
    command = [sys.executable, str(program), str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert made.returncode == 0, made.stderr[-4000:]
    return folder


def test_two_processes_equal_one(folder, tmp_path):
    """Rows of many lengths, so that a mean of the processes' means is another number; 7 rows of evaluation in batches of 2 for each."""
    changes = {"per_device_train_batch_size": 2, "logging_steps": 2}
    one = trained(distillation_trainer(tmp_path, train=16, arguments_changes=changes, **OPTIONS))
    two = json.loads((folder / "replicated.json").read_text())
    names = ("loss", "grad_norm", *METRICS)
    got = torch.tensor([[log[name] for name in names] for log in two["history"] if "loss" in log], dtype=torch.float64)
    torch.testing.assert_close(got, curve(one, *names), rtol=1e-5, atol=1e-7)
    metrics = one.evaluate()
    for name in ("loss", *METRICS):
        assert two["metrics"][f"eval_{name}"] == pytest.approx(metrics[f"eval_{name}"], rel=1e-5), name
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder / "replicated")
    for (name, parameter), wanted in zip(saved.named_parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_a_sharded_student_has_its_loss_inside_of_its_forward(folder):
    wanted = loss_of_a_batch(make_student(), make_teacher()).item()
    assert json.loads((folder / "sharded.json").read_text()) == pytest.approx(wanted, rel=1e-6)
