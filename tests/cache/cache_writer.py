"""A teacher of a few hundred numbers and its data set, for the tests of offline teachers; and, run as a program, writers that die.

    python cache_writer.py kill FOLDER      killed at one step after another, each in a folder FOLDER/STEP; prints the first that is none
    python cache_writer.py hang FOLDER      prints "ready" in the middle of the second shard, and waits there
    python cache_writer.py full FOLDER      on a disk that is too small: prints what it was told before and while writing
"""

import io
import os
import signal
import sys
import time
from pathlib import Path

import torch

from distill_kernels.api.cache import whole_files, writing
from distill_kernels.api.cache.layout import CacheError
from distill_kernels.api.cache.writing import write_teacher_cache
from distill_kernels.api.models.backbone import BackboneOutput

STRIDE = 3  # of the steps that writers die at; a file takes four, so all of them are met, in one file or another
VOCABULARY, WIDTH = 97, 24
OPTIONS = {"shard_mib": 0.0026, "batch_size": 2, "fingerprint": "a small teacher"}  # four shards


def matrix(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows():
    lengths = torch.randint(2, 16, (14,), generator=torch.Generator().manual_seed(3)).tolist()
    return [torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(n + i)) for i, n in enumerate(lengths)]


def teacher(input_ids, attention_mask=None, *, dtype=torch.float32, bias=True, softcap=3.0, vocabulary=VOCABULARY):
    """Hidden states that depend on all tokens up to theirs, as a causal model's do."""
    hidden = matrix(0, VOCABULARY, WIDTH)[input_ids].cumsum(1).tanh() * 2
    weight = matrix(1, VOCABULARY, WIDTH)[:vocabulary] * 0.5
    bias = matrix(2, VOCABULARY)[:vocabulary].to(dtype) if bias else None
    return BackboneOutput(hidden.to(dtype), weight.to(dtype), bias, 1.25, softcap)


def contents(folder):
    """Every file's bytes, hidden ones too."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


class Steps:
    """Calls `at(n)` before the n-th step of a writer: a run of the teacher, the second half of a file, what brings it to the disk, a
    renaming, a removal."""

    def __init__(self, at):
        self.at, self.number = at, 0

    def step(self):
        self.number += 1
        self.at(self.number)

    def teacher(self, **batch):
        self.step()
        return teacher(**batch)

    def stepping(self, call):
        def stepped(*arguments, **options):
            self.step()
            return call(*arguments, **options)

        return stepped

    def open(self, path, mode):
        steps = self

        class HalfByHalf(io.FileIO):
            def write(self, data):
                super().write(data[: len(data) // 2])
                steps.step()
                return super().write(data[len(data) // 2 :])

        return HalfByHalf(path, mode)

    def install(self, patch):
        """patch(object, name, value): into what a writer calls."""
        patch(whole_files, "open", self.open)
        patch(os, "fsync", self.stepping(os.fsync))
        patch(os, "replace", self.stepping(os.replace))
        patch(Path, "unlink", self.stepping(Path.unlink))


def kill_at_one_step_after_another(folder):
    torch.set_num_threads(1)
    write_teacher_cache(teacher, rows(), folder / "0", **OPTIONS)  # so that the children have everything imported
    died, number = True, 1 - STRIDE
    while died:
        number += STRIDE
        child = os.fork()
        if child == 0:
            steps = Steps(lambda n, last=number: n == last and os.kill(os.getpid(), signal.SIGKILL))
            steps.install(setattr)
            write_teacher_cache(steps.teacher, rows(), folder / str(number), **OPTIONS)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        died = os.WIFSIGNALED(status)
        assert died or os.WEXITSTATUS(status) == 0, status
    print(number)


def hang(folder):
    def slow(**batch):
        if (folder / "shard-00000.safetensors.json").exists():
            print("ready", flush=True)
            time.sleep(600)
        return teacher(**batch)

    write_teacher_cache(slow, rows(), folder, **OPTIONS)


def on_a_full_disk(folder):
    for check in (writing._check_room, lambda *_: None):
        writing._check_room = check
        try:
            write_teacher_cache(teacher, rows(), folder, **OPTIONS)
        except CacheError as error:
            print(error)
    print(*sorted(path.name for path in folder.iterdir()))


if __name__ == "__main__":
    {"kill": kill_at_one_step_after_another, "hang": hang, "full": on_a_full_disk}[sys.argv[1]](Path(sys.argv[2]))
