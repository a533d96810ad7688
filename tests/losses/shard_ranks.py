"""What each rank of a process group runs for test_shards.py: python shard_ranks.py FOLDER WHICH GROUP..., as `main` says.

What went wrong with a case is left in FOLDER, and the other ranks go on with the next one. Importing torch takes longer than most cases do,
so that one process imports it for all ranks of all groups, and forks.
"""

import datetime
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as distributed
from accuracy import with_gradients
from shard_calls import inputs_of, sharded
from shard_cases import CASES, names_of

from distill_kernels import distillation_loss
from distill_kernels.call import shards


def join(folder: Path, own: int, ranks: int):
    torch.set_num_threads(1)
    # Long: a rank that dies closes its connections, which the others see at once; this is for a machine that has other things to do.
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=own, world_size=ranks, timeout=datetime.timedelta(seconds=1500)
    )


def run_cases(folder: Path, own: int, ranks: int, which: str):
    join(folder, own, ranks)
    results = {}
    for name in names_of(ranks, which):
        torch.manual_seed(0)
        begin = os.times()
        try:
            CASES[name][0]()
            results[name] = ""
        except Exception:  # noqa: BLE001 — it is the test's, and told by the process that asked
            results[name] = traceback.format_exc()
        (folder / f"rank{own}.json").write_text(json.dumps(results))
        failed = torch.tensor([float(results[name] != "")])
        distributed.all_reduce(failed)  # so that the ranks begin the next case together
        end = os.times()
        print(f"{end.user + end.system - begin.user - begin.system:.2f} s, rank {own} of {ranks}: {name}")
    distributed.barrier()


def run_until_one_dies(folder: Path, own: int, exchanges: int):
    """Rank 1 of two dies after so many exchanges; the other one writes what came of it."""
    join(folder, own, 2)
    hidden, calls, gather = inputs_of(tokens=4, bias=False), [], shards.Shards.gather

    def counted(self, values):
        calls.append(1)
        if own == 1 and len(calls) > exchanges:
            os._exit(9)
        return gather(self, values)

    shards.Shards.gather = counted
    try:
        sharded()(hidden.student_hidden.requires_grad_(), *hidden[1:4])
    except (RuntimeError, ValueError) as error:
        (folder / "said").write_text(f"{len(calls)} {type(error).__name__} {error}")


def forked(function, *arguments):
    """A process that runs it. It ends without more: gloo's threads, taken down with the interpreter, may abort it."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            function(*arguments)
            code = 0
        except BaseException:  # noqa: BLE001 — it is told, and the code says so
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return child


def codes_of(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(folder: Path, which: str, *groups: str):
    """Groups one after the other: "3" runs the cases of three ranks in FOLDER/3, "dead-1" two ranks of which one dies after an exchange.
    FOLDER/GROUP/codes.json has how the ranks ended."""
    torch.set_num_threads(1)
    for backend in ("torch", "triton"):  # what a first call imports, too, comes before the forks
        with_gradients(distillation_loss, inputs_of(tokens=2, vocabulary=40), 1.0, backend=backend)
    for group in groups:
        own = folder / group
        own.mkdir()
        kind, _, number = group.rpartition("-")
        if kind == "dead":
            children = [forked(run_until_one_dies, own, rank, int(number)) for rank in range(2)]
        else:
            children = [forked(run_cases, own, rank, int(number), which) for rank in range(int(number))]
        (own / "codes.json").write_text(json.dumps(codes_of(children)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
