"""The loops of Lightning, Accelerate and FSDP2 in examples/: run as their docstrings say, they lose what a plain loop in torch loses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ON_TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # torchrun, of this Python; a port that is free


def run(package, *arguments):
    pytest.importorskip(package)
    made = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=EXAMPLES, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    return [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)$", made.stdout, re.MULTILINE)]


@pytest.fixture(scope="module")
def plain():
    """Losses of whole batches, from logits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import stand_ins
    student, teacher = stand_ins.models()
    optimizer = torch.optim.AdamW(student.parameters(), lr=stand_ins.LEARNING_RATE)
    losses = []
    for input_ids in stand_ins.rows().split(stand_ins.BATCH):
        z, y = (model(input_ids).logits[:, :-1].flatten(0, 1) for model in (student, teacher))
        divergence = F.kl_div(F.log_softmax(z / 2, -1), F.log_softmax(y / 2, -1), log_target=True, reduction="batchmean")
        loss = 4 * divergence + 0.1 * F.cross_entropy(z, input_ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]
    return losses


@pytest.mark.exhaustive
def test_lightning_loop_is_a_plain_loop(plain):
    assert run("lightning", "lightning_loop.py") == pytest.approx(plain, rel=1e-4)


@pytest.mark.exhaustive
def test_accelerate_loop_on_two_processes_is_a_plain_loop(plain):
    assert run("accelerate", *ON_TWO, "accelerate_loop.py") == pytest.approx(plain, rel=1e-4)


@pytest.mark.exhaustive
def test_torchrun_fsdp2_on_two_processes_is_a_plain_loop(plain):
    assert run("torch", *ON_TWO, "torchrun_fsdp2.py") == pytest.approx(plain, rel=1e-4)


def test_divided_vocabulary_on_two_processes_is_a_plain_loop(plain):
    assert run("torch", *ON_TWO, "torchrun_vocab_parallel.py") == pytest.approx(plain, rel=1e-4)
