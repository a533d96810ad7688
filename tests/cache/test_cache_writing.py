"""Writers of teacher caches that are killed, run out of disk, meet each other or are many: the same files, or a sentence."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cache_writer
import pytest
import torch
from cache_writer import OPTIONS, Steps, contents, rows, teacher

from distill_kernels import TeacherCache, write_teacher_cache
from distill_kernels.api.cache import layout, writing
from distill_kernels.api.cache.layout import CacheError
from distill_kernels.api.cache.whole_files import WriterLock

PROGRAM = [sys.executable, cache_writer.__file__]
pytest.importorskip("safetensors")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the programs, and what bits depend on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The files of a cache that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "cache"
    report = write_teacher_cache(teacher, rows(), folder, **OPTIONS)
    assert report.complete and report.shards_written == report.shards == 4
    return contents(folder)


def test_the_folder_holds_the_index_the_head_and_the_shards(undisturbed):
    assert sorted(undisturbed) == ["head.safetensors", "index.json", *(f"shard-{i:05}.safetensors" for i in range(4))]


def test_a_writer_killed_at_any_step_is_continued_to_the_same_bytes(tmp_path, undisturbed):
    made = subprocess.run([*PROGRAM, "kill", tmp_path], stdout=subprocess.PIPE, text=True, check=True)
    steps = int(made.stdout)
    kept = []
    for number in range(1, steps, cache_writer.STRIDE):
        folder = tmp_path / str(number)
        died_with = contents(folder) if folder.exists() else {}
        for name in undisturbed.keys() & died_with.keys():
            assert died_with[name] == undisturbed[name], f"{name} is not whole after step {number}"
        report = write_teacher_cache(teacher, rows(), folder, **OPTIONS)
        assert contents(folder) == undisturbed, f"killed at step {number}"
        kept.append(report.shards_kept)
    # Every number of shards was kept at some step, and never fewer later.
    assert kept == sorted(kept) and set(kept) == {0, 1, 2, 3, 4} and steps > 60


def test_shards_that_are_whole_are_not_computed_again(tmp_path):
    def dies_in_the_third_shard(**batch):
        if (tmp_path / "shard-00001.safetensors").exists():
            raise ZeroDivisionError
        return teacher(**batch)

    with pytest.raises(ZeroDivisionError):
        write_teacher_cache(dies_in_the_third_shard, rows(), tmp_path, **OPTIONS)
    seen = []

    def watched(**batch):
        seen.append(len(batch["input_ids"]))
        return teacher(**batch)

    report = write_teacher_cache(watched, rows(), tmp_path, **OPTIONS)
    plan = TeacherCache.open(tmp_path).plan
    assert (report.shards_kept, report.shards_written) == (2, 2)
    assert sum(seen) == 1 + sum(plan.shard_rows[2:])  # the one that shows the size of the model


def test_a_finished_cache_is_not_written_again(tmp_path, undisturbed):
    write_teacher_cache(teacher, rows(), tmp_path, **OPTIONS)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    report = write_teacher_cache(teacher, rows(), tmp_path, **OPTIONS)
    assert report.complete and report.shards_written == 0 and report.shards_kept == 4
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fills_at_any_step_leaves_what_was_whole(tmp_path, undisturbed, code):
    total = Steps(lambda n: None)
    with pytest.MonkeyPatch.context() as patch:
        total.install(partial(patch.setattr, raising=False))
        write_teacher_cache(total.teacher, rows(), tmp_path / "all", **OPTIONS)

    class Full(Steps):
        def teacher(self, **batch):
            return teacher(**batch)  # is no writing

    def fail(n, number):
        if n == number:
            raise OSError(code, os.strerror(code))

    tested = range(1, total.number, cache_writer.STRIDE if code == errno.ENOSPC else 17)
    seen = 0
    for number in tested:
        folder = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            steps = Full(lambda n, number=number: fail(n, number))
            steps.install(lambda owner, *value: owner is Path or patch.setattr(owner, *value, raising=False))
            try:
                write_teacher_cache(steps.teacher, rows(), folder, **OPTIONS)
            except CacheError as error:
                seen += 1
                assert os.strerror(code) in str(error) and str(folder) in str(error) and "goes on from there" in str(error)
        left = contents(folder)
        assert not [name for name in left if name.endswith(".partial")]
        assert all(left[name] == undisturbed[name] for name in left.keys() & undisturbed.keys())
        write_teacher_cache(teacher, rows(), folder, **OPTIONS)
        assert contents(folder) == undisturbed
        shutil.rmtree(folder)
    assert seen > (10 if code == errno.ENOSPC else 1)


def test_a_disk_that_is_really_full(tmp_path):
    """A file system in memory of 20 KiB, in a name space of its own."""
    mount = f"mount -t tmpfs -o size=20k none {tmp_path} && exec {' '.join(map(str, PROGRAM))} full {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    made = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, text=True, check=True)
    before, during, left = made.stdout.splitlines()
    assert "would take" in before and "MiB free" in before
    assert "No space left on device" in during
    assert "head.safetensors" in left and "partial" not in left and "index.json" not in left.split()


def test_sizes_are_predicted_before_anything_is_written(tmp_path, undisturbed):
    report = write_teacher_cache(teacher, rows(), tmp_path / "cache", predict_only=True, **OPTIONS)
    assert not (tmp_path / "cache").exists() and not report.complete
    real = sum(map(len, undisturbed.values()))
    assert real <= report.predicted_bytes <= real + layout.HEADER_BYTES * len(undisturbed)


def test_too_small_a_disk_is_an_error_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    ran = []

    def watched(**batch):
        ran.append(batch["input_ids"].numel())
        return teacher(**batch)

    with pytest.raises(CacheError, match=r"would take [\d.]+ MiB more, and its disk has 0.0 MiB free"):
        write_teacher_cache(watched, rows(), tmp_path / "cache", **OPTIONS)
    assert ran == [1] and not (tmp_path / "cache").exists()


# Several writers


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("kind", ["hidden", "top-k"])
def test_any_number_of_ranks_writes_the_same_files(tmp_path, world_size, kind):
    options = {**OPTIONS, "kind": kind} | ({"top_k": 5} if kind == "top-k" else {})
    one = write_teacher_cache(teacher, rows(), tmp_path / "one", **options)
    reports = [
        write_teacher_cache(teacher, rows(), tmp_path / "many", rank=rank, world_size=world_size, **options)
        for rank in reversed(range(world_size))
    ]
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert [report.complete for report in reports] == [False] * (world_size - 1) + [True]
    assert sum(report.shards_written for report in reports) == one.shards > 2


def test_a_cache_begun_by_some_ranks_is_finished_by_others(tmp_path, undisturbed):
    write_teacher_cache(teacher, rows(), tmp_path, rank=1, world_size=3, **OPTIONS)
    with pytest.raises(CacheError, match="is an unfinished cache with 1 of 4 shards; call write_teacher_cache"):
        TeacherCache.open(tmp_path)
    report = write_teacher_cache(teacher, rows(), tmp_path, **OPTIONS)
    assert (report.shards_kept, report.shards_written) == (1, 3)
    assert contents(tmp_path) == undisturbed


def test_a_second_writer_is_refused_until_the_first_is_dead(tmp_path, undisturbed):
    first = subprocess.Popen([*PROGRAM, "hang", tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "ready\n"
        for place in ({}, {"rank": 0, "world_size": 2}):
            with pytest.raises(CacheError, match=rf'is being written by another process, .*"pid": {first.pid}.*wait for it') as refused:
                write_teacher_cache(teacher, rows(), tmp_path, **OPTIONS, **place)
            assert str(tmp_path) in str(refused.value)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
    assert (tmp_path / ".writer-0-of-1.lock").exists()
    (tmp_path / ".shard-00001.safetensors.0-of-1.partial").write_text("what it had begun, had it come so far")
    write_teacher_cache(teacher, rows(), tmp_path, rank=0, world_size=2, **OPTIONS)
    assert not list(tmp_path.glob(".*")), "the dead writer's lock, and what it had begun, are removed"
    write_teacher_cache(teacher, rows(), tmp_path, rank=1, world_size=2, **OPTIONS)
    assert contents(tmp_path) == undisturbed


def test_ranks_of_one_world_write_together_and_of_two_do_not(tmp_path):
    with WriterLock(tmp_path, 0, 2):
        with WriterLock(tmp_path, 1, 2):
            for rank, world_size in ((0, 1), (0, 2), (1, 2), (2, 3)):
                with pytest.raises(CacheError, match="being written"), WriterLock(tmp_path, rank, world_size):
                    pass
            assert len(list(tmp_path.glob(".writer*"))) == 2, "who was refused leaves nothing behind, and takes nothing away"
        with WriterLock(tmp_path, 1, 2):
            pass
    with WriterLock(tmp_path, 0, 1):
        pass
    assert not list(tmp_path.iterdir())


# Bad input


def stopped(match, tmp_path, run=teacher, data=None, **options):
    with pytest.raises(CacheError, match=match):
        write_teacher_cache(run, rows() if data is None else data, tmp_path / "cache", **{**OPTIONS, **options})
    assert not (tmp_path / "cache").exists(), "nothing is made before everything is checked"


@pytest.mark.parametrize(
    "options, match",
    [
        ({"kind": "logits"}, "kind must be one of 'hidden', 'top-k', got 'logits'"),
        ({"dtype": "float64"}, "dtype of kind 'hidden' must be one of 'bfloat16'"),
        ({"kind": "top-k", "top_k": 4, "dtype": "int8"}, "dtype of kind 'top-k' must be one of 'float32', 'float16', got 'int8'"),
        ({"kind": "top-k"}, "top_k is None with kind 'top-k'"),
        ({"top_k": 4}, "top_k is 4 with kind 'hidden'"),
        ({"kind": "top-k", "top_k": 98}, "from 1 to the teacher's vocabulary, 97, got 98"),
        ({"kind": "top-k", "top_k": 2.0}, "got 2.0"),
        ({"fingerprint": None}, "pass fingerprint="),
        ({"rank": 0}, "wanted both or neither"),
        ({"rank": 2, "world_size": 2}, "rank is 2, wanted less than world_size, 2"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, match):
    stopped(match, tmp_path, **options)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": float("nan")}, {"batch_size": 0}, {"shard_mib": 0}])
def test_numbers_that_make_no_sense_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        write_teacher_cache(teacher, rows(), tmp_path / "cache", **{**OPTIONS, **options})


@pytest.mark.parametrize(
    "data, match",
    [
        ([], "there are no rows"),
        ([[1, 2], []], "row 1 holds nothing"),
        ([[1, 2], [1.5, 2.0]], "row 1 holds float64"),
        ([[1, 2], [[3, 4]]], r"row 1 holds int64 of shape \(1, 2\)"),
        ([[1, 2], [3, -100]], "row 1 has the token id -100"),
        ([[1, 2], [3, 2**31]], "row 1 has the token id 2147483648"),
        ([[1, 2], [3, 4], [5, 97, 6]], "row 2 has the token id 97, but the teacher's vocabulary has 97 entries"),
        (torch.zeros(3, dtype=torch.int64), r"shape \(3,\), wanted token ids"),
        (torch.zeros(3, 4), "row 0 holds float32"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, data, match):
    stopped(match, tmp_path, data=data)


def test_a_teacher_that_is_none_is_refused(tmp_path):
    stopped("teacher is str, wanted a model", tmp_path, run="SmolLM2")
    stopped("teacher is in training mode", tmp_path, run=torch.nn.Linear(2, 2))
    stopped("wanted both float32, bfloat16 or float16", tmp_path, run=lambda **batch: teacher(**batch, dtype=torch.float64))


def test_missing_packages_are_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stopped(r'need tqdm: pip install "distill_kernels\[train\]"', tmp_path, progress=True)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    stopped("need safetensors", tmp_path)
    with pytest.raises(CacheError, match="need safetensors"):
        TeacherCache.open(tmp_path)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"temperature": 2.0}, r"temperature 1.0 where 2.0 is wanted"),
        ({"dtype": "int8"}, "dtype 'bfloat16' where 'int8' is wanted"),
        ({"kind": "top-k", "top_k": 4}, "kind 'hidden' where 'top-k' is wanted"),
        ({"fingerprint": "another"}, "teacher 'a small teacher' where 'another' is wanted"),
        ({"batch_size": 3}, "batch_size 2 where 3 is wanted"),
        ({"shard_mib": 0.01}, "shard_mib"),
        ({"data": [[1, 2, 3]]}, "dataset_sha256"),
        ({"vocabulary": 96, "data": [[1, 2, 3]]}, "vocabulary 97 where 96 is wanted"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_with_another_cache_is_refused_and_left_alone(tmp_path, change, match, finished):
    place = {} if finished else {"rank": 0, "world_size": 2}
    write_teacher_cache(teacher, rows(), tmp_path, **OPTIONS, **place)
    before = contents(tmp_path)
    options = {**OPTIONS, **change}
    data, vocabulary = options.pop("data", rows()), options.pop("vocabulary", cache_writer.VOCABULARY)
    with pytest.raises(CacheError, match=rf"{tmp_path} holds an? {'' if finished else 'unfinished '}cache of .*{match}"):
        write_teacher_cache(lambda **batch: teacher(**batch, vocabulary=vocabulary), data, tmp_path, **options)
    assert contents(tmp_path) == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter 1")
    with pytest.raises(CacheError, match=r"is not empty and holds no cache \(first thesis.tex\)"):
        write_teacher_cache(teacher, rows(), tmp_path, **OPTIONS)
    with pytest.raises(CacheError, match="is a file, wanted a folder"):
        write_teacher_cache(teacher, rows(), tmp_path / "thesis.tex", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_manifest_costs_only_its_shard(tmp_path, undisturbed):
    write_teacher_cache(teacher, rows(), tmp_path, rank=0, world_size=2, **OPTIONS)
    (tmp_path / "shard-00000.safetensors.json").write_text("{")
    (tmp_path / "shard-00002.safetensors").write_bytes(undisturbed["shard-00002.safetensors"][:-1])
    report = write_teacher_cache(teacher, rows(), tmp_path, **OPTIONS)
    assert report.shards_kept == 0 and contents(tmp_path) == undisturbed


def test_a_teacher_is_told_from_one_that_was_trained_further():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(512, 64), torch.nn.Linear(64, 512, bias=False))
    before = writing.token_rows.model_fingerprint(model)
    assert writing.token_rows.model_fingerprint(model) == before
    with torch.no_grad():
        model[1].weight += 1e-6 * torch.randn(512, 64)
    assert writing.token_rows.model_fingerprint(model) != before
    assert writing.token_rows.model_fingerprint(model.bfloat16()) != before
