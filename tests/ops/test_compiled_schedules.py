"""Numbers that change from step to step of a compiled loss: every step is the eager one's, in one process and in a second on its cache.

torch's compiler keeps a stale float in its caches (pytorch/pytorch#197889), which `call.problem.as_text` goes round.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scheduled_losses import NUMBERS, STEPS

PROGRAM = Path(__file__).with_name("scheduled_losses.py")


def errors_of(cache, *numbers):
    """By (number, form, step), from a process of its own."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, PROGRAM, *numbers], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    *rows, last = [json.loads(line) for line in ran.stdout.splitlines()]
    return {(row["number"], row["form"], row["step"]): row["error"] for row in rows}, last["hits"]


def check(cache, *numbers, forms):
    # Sums of some hundred float32 numbers in another order: 1e-6, and a few times that.
    for process in ("first", "second"):
        errors, hits = errors_of(cache, *numbers)
        assert process == "first" or hits > 0, "the second process did not read the first one's cache"
        assert len(errors) == forms * len(STEPS)
        assert not {key: error for key, error in errors.items() if not error < 1e-5}, process


def test_scheduled_temperature_is_the_eager_one_in_two_processes(tmp_path):
    check(tmp_path, "temperature", forms=1)


@pytest.mark.exhaustive
def test_temperature_of_every_form_is_the_eager_one_in_two_processes(tmp_path):
    check(tmp_path, forms=5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("numbers", [NUMBERS[begin : begin + 5] for begin in range(0, len(NUMBERS), 5)], ids=lambda numbers: numbers[0])
def test_scheduled_numbers_are_the_eager_ones_in_two_processes(tmp_path, numbers):
    check(tmp_path, *numbers, forms=len(numbers))
