"""Peak memory of each rank of a divided vocabulary above its inputs, forward + backward, each rank a process of this machine:

    python -m pytest -c benchmarks/pytest.ini benchmarks/timing/bench_shards.py

It should be that of a rank's share of the gradients and of the planned workspace: what belongs to the vocabulary falls with the number of
ranks. Results go to results/shards.csv.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed

import distill_kernels
from benchmarks import cases, record
from distill_kernels.api.measuring import peak_memory

TOKENS, VOCABULARY, STUDENT_DIM, TEACHER_DIM = 1024, 131072, 1024, 1024
WORKSPACE_MIB = 192
MIB = 2**20

rows = []


@pytest.fixture(scope="module", autouse=True)
def results():
    yield
    if rows:
        print(f"\nwritten: {record.write('shards', rows, ('vocabulary', 'ranks'))}")


def measure(folder: str, rank: int, ranks: int) -> dict:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)

    def loss(*tensors):
        return distill_kernels.distillation_loss(*tensors, process_group=distributed.group.WORLD, workspace_mib=WORKSPACE_MIB)

    step = cases.forward_backward(loss)
    step(*cases.Case("warm-up", 96, 8192, 16, 16).tensors(torch.float32))
    # The same tokens on all ranks; cases draw the hidden states before the heads.
    tensors = cases.Case("", TOKENS, VOCABULARY // ranks, STUDENT_DIM, TEACHER_DIM).tensors(torch.float32)
    for hidden in (tensors[0], tensors[2]):
        with torch.no_grad():
            distributed.broadcast(hidden, 0)
    peak = peak_memory.above(lambda: step(*tensors), tensors[0].device)
    distributed.barrier()
    distributed.destroy_process_group()
    return {"peak": peak, "heads": tensors[1].nbytes + tensors[3].nbytes}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def bench_peak_memory_of_a_rank(benchmark, ranks):
    def run():
        with tempfile.TemporaryDirectory() as folder:
            processes = [
                subprocess.Popen([sys.executable, "-m", "benchmarks.timing.bench_shards", folder, str(rank), str(ranks)],
                                 stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
                for rank in range(ranks)
            ]  # fmt: skip
            return [json.loads(process.communicate()[0]) for process in processes]

    measured = benchmark.pedantic(run, rounds=1)
    sizes = TOKENS, VOCABULARY, STUDENT_DIM, TEACHER_DIM
    plan = distill_kernels.plan(*sizes, ranks=ranks, backend="torch", workspace_mib=WORKSPACE_MIB)
    peak = max(rank["peak"] for rank in measured)
    rows.append(
        {
            "tokens": TOKENS, "vocabulary": VOCABULARY, "student_dim": STUDENT_DIM, "teacher_dim": TEACHER_DIM, "ranks": ranks,
            "heads_mib": measured[0]["heads"] / MIB, "gradients_mib": plan.gradient_bytes / MIB,
            "planned_workspace_mib": plan.workspace_bytes / MIB, "peak_above_inputs_mib": peak / MIB,
        }
    )  # fmt: skip
    assert peak <= plan.peak_bytes + 48 * MIB, "more than was planned, and what torch's products and gloo keep"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
