"""A vocabulary divided over the ranks of a process group gives what the whole one gives; the cases are in shard_ranks.py."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shard_ranks import CASES

RANKS = Path(__file__).parent / "shard_ranks.py"
SECONDS = 600


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{case: what went wrong, by rank} of so many ranks, each number run once."""
    found = {}

    def of(ranks):
        if ranks not in found:
            folder = tmp_path_factory.mktemp(f"ranks{ranks}")
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
            processes = [
                subprocess.Popen(
                    [sys.executable, str(RANKS), str(folder), str(rank), str(ranks)],
                    env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                )
                for rank in range(ranks)
            ]  # fmt: skip
            outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
            assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
            by_rank = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
            found[ranks] = {name: [result[name] for result in by_rank] for name in by_rank[0]}
        return found[ranks]

    return of


@pytest.mark.parametrize(("ranks", "name"), sorted((ranks, name) for name, (_, numbers) in CASES.items() for ranks in numbers))
def test_ranks_that_share_a_vocabulary(ranks, name, results):
    for rank, wrong in enumerate(results(ranks)[name]):
        assert not wrong, f"rank {rank}: {wrong}"


DEAD = """
import datetime, os, sys, torch, torch.distributed as distributed
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=20))
import distill_kernels, distill_kernels.shards
torch.manual_seed(0)
hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(30, 8)
arguments = hidden, head, torch.randn(4, 8), torch.randn(30, 8)
calls, gather = [], distill_kernels.shards.Shards.gather
def counted(self, values):
    calls.append(1)
    if rank == 1 and len(calls) > int(sys.argv[3]):
        os._exit(9)
    return gather(self, values)
distill_kernels.shards.Shards.gather = counted
try:
    distill_kernels.distillation_loss(*arguments, process_group=distributed.group.WORLD)
except (RuntimeError, ValueError) as error:
    print(len(calls), type(error).__name__, error)
    sys.exit(3)
"""


# After having compared what the ranks were called with, after the log-sum-exps, or before anything: after so many exchanges.
@pytest.mark.parametrize("exchanges", [0, 1, 2])
def test_a_rank_that_dies_ends_in_an_error_on_the_others(exchanges, tmp_path):
    begin = time.monotonic()
    processes = [
        subprocess.Popen([sys.executable, "-c", DEAD, str(rank), str(tmp_path), str(exchanges)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert processes[1].returncode == 9
    assert processes[0].returncode == 3, outputs[0]
    assert outputs[0].startswith(f"{exchanges + 1} "), "the other one failed elsewhere"
    assert time.monotonic() - begin < 100
