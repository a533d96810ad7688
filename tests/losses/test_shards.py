"""A vocabulary divided over the ranks of a process group gives what the whole one gives; the cases are in shard_cases.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shard_cases import names_of

RANKS = Path(__file__).parent / "shard_ranks.py"
SECONDS = 1800  # against a hang alone
DEATHS = ("dead-0", "dead-1", "dead-2")


def run(folder, which, *groups):
    """What the ranks said. What came of them is in the folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(RANKS.parents[1])}
    command = [sys.executable, str(RANKS), str(folder), which, *groups]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert made.returncode == 0, made.stdout + made.stderr
    return made.stdout + made.stderr


@pytest.mark.parametrize("which", ["quick", pytest.param("exhaustive", marks=pytest.mark.exhaustive)])
def test_ranks_that_share_a_vocabulary(which, tmp_path):
    """All cases in one test: they share processes, which tests on several workers would start once for each."""
    said, wrong = run(tmp_path, which, "1", "2", "3", "4"), []
    for ranks in (1, 2, 3, 4):
        assert json.loads((tmp_path / str(ranks) / "codes.json").read_text()) == [0] * ranks, said
        for rank in range(ranks):
            results = json.loads((tmp_path / str(ranks) / f"rank{rank}.json").read_text())
            assert list(results) == names_of(ranks, which) != []
            wrong += [f"rank {rank} of {ranks}, {name}: {text}" for name, text in results.items() if text]
    assert not wrong, "\n".join(wrong)


def test_a_rank_that_dies_ends_in_an_error_on_the_others(tmp_path):
    """After having compared what the ranks were called with, after the log-sum-exps, or before anything: after so many exchanges."""
    said = run(tmp_path, "quick", *DEATHS)
    for exchanges, group in enumerate(DEATHS):
        assert json.loads((tmp_path / group / "codes.json").read_text()) == [0, 9], said
        heard = (tmp_path / group / "said").read_text()
        assert heard.startswith(f"{exchanges + 1} "), f"the other one failed elsewhere: {heard}"
        # It was told by the connection, and did not wait for time to pass.
        assert "imed out" not in heard and "imeout" not in heard, heard
