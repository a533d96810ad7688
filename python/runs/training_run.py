"""A local student trained on a local text, with a teacher, a teacher's cache, or neither; it can be stopped at any moment and goes on."""

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch

from distill_kernels.api.losses.distillation import DistillationLoss
from distill_kernels.api.models import initial_models
from distill_kernels.api.runs import checkpoints, inputs, loop, output_folder
from distill_kernels.api.runs import report as told
from distill_kernels.api.runs.inputs import Settings
from distill_kernels.api.user_error import UserError

LOG, REPORT, PLOT, STUDENT, LOCK = "log.jsonl", "train.json", "curves.png", "student", ".lock"
TITLE = "training"


def run(settings: Settings) -> dict[str, Any]:
    """Trains, and returns what is written to train.json; see `distill-kernels train --help` for the files.

    Raises
        UserError: something the user can put right, in one sentence. Whole checkpoints stay.
    """
    _check(settings)
    settings.output.mkdir(parents=True, exist_ok=True)
    with _alone(settings.output):
        checkpoint = _where_to_begin(settings)
        if (settings.output / REPORT).exists():
            report: dict[str, Any] = json.loads((settings.output / REPORT).read_text(encoding="utf-8"))
            inputs.check_same_settings(report, settings, settings.output / REPORT)
            checkpoints.remove(settings.output)
            print(f"{settings.output} is finished: nothing was left to do")
            return report
        if checkpoint is None and (settings.output / STUDENT).exists():
            raise UserError(
                f"{settings.output / STUDENT} is of a run whose checkpoints and report are gone; delete it, or choose another --output"
            )
        return _train(settings, checkpoint)


def _train(settings: Settings, checkpoint: Path | None) -> dict[str, Any]:
    started = time.perf_counter()
    output, autocast = settings.output, inputs.PRECISIONS[settings.precision]
    made = inputs.load(settings, checkpoint)
    loop.check_loss(made.student, made.text, autocast, **made.loss)
    done = 0 if checkpoint is None else checkpoints.read_run(checkpoint)["step"]
    optimizer, schedule = loop.optimizer_and_schedule(made.student, settings.learning_rate, settings.steps, done)
    torch.manual_seed(settings.seed)
    if checkpoint is not None:
        checkpoints.restore(checkpoint, made.student, optimizer)
        print(f"going on from {checkpoint}", flush=True)
    trained = [name for name, parameter in made.student.named_parameters() if parameter.requires_grad]
    state = {**made.identity, "trained": trained}
    marks = {0, settings.steps, *range(settings.evaluate_every, settings.steps, settings.evaluate_every)}
    with _log(output, done) as log:
        last = time.perf_counter()
        text = loop.PreparedText(made.text) if made.loss.get("sweep") else made.text
        for record in loop.train_and_evaluate(
            made.student, text, made.order, made.held_out, optimizer, schedule,
            marks=marks, done=done, title=TITLE, at_once=settings.at_once, autocast=autocast, **made.loss,
        ):  # fmt: skip
            now = time.perf_counter()
            last, seconds, step = now, now - last, int(record["step"])
            ends = step != 0 and (step % settings.checkpoint_every == 0 or step == settings.steps)
            _write(log, {**record, "seconds": seconds}, to_disk=ends)
            if ends:
                checkpoints.save(output, step, made.student, made.tokenizer, optimizer, state)
    return _finish(settings, made, time.perf_counter() - started)


def _finish(settings: Settings, made: inputs.Inputs, seconds: float) -> dict[str, Any]:
    """The student, the report and the plot; then the checkpoints are not needed any more."""
    records = _read_log(settings.output)
    curve = [{name: value for name, value in record.items() if name != "seconds"} for record in records if "perplexity" in record]
    kept = ("kl", "top1_agreement", "perplexity")
    quality: list[dict[str, float]] = [{name: point[name] for name in kept if name in point} for point in curve]
    table = {"student before": quality[0], "student after": quality[-1]}
    if "kl" in quality[0]:
        table["teacher"] = loop.evaluate_teacher(made.held_out, settings.at_once or settings.batch_size)
    losses = [record["loss"] for record in records if record["step"]]
    report = {
        **made.identity,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("distill_kernels", "torch", "transformers")}},
        "machine": {"architecture": platform.machine(), "threads": torch.get_num_threads(), "device": str(made.student.device)},
        **made.description,
        "training_loss": losses,
        "curve": curve,
        "table": table,
        "seconds": seconds,  # since the last start
        "seconds_of_steps": sum(record["seconds"] for record in records),
    }
    if not (settings.output / STUDENT).exists():
        with output_folder.whole_folder(settings.output / STUDENT) as folder:
            checkpoints.save_model(folder, made.student, made.tokenizer)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    writers = {
        PLOT: lambda path: told.plot(path, {"student": curve}, {"student": losses}),
        REPORT: lambda path: path.write_text(text, encoding="utf-8"),
    }
    output_folder.write_files(settings.output, writers)
    checkpoints.remove(settings.output)
    print("\n" + told.table(table))
    print(f"\nwrote {', '.join(str(settings.output / name) for name in (STUDENT, REPORT, PLOT))} and {LOG} after {seconds:.0f} s")
    return report


def _check(settings: Settings) -> None:
    """Everything that can be told before anything is read."""
    whole = {"--steps": settings.steps, "--batch-size": settings.batch_size, "--evaluate-every": settings.evaluate_every}
    whole |= {"--checkpoint-every": settings.checkpoint_every, "--held-out-tokens": settings.held_out_tokens}
    whole |= {} if settings.at_once is None else {"--at-once": settings.at_once}
    for flag, value, least in [*((flag, value, 1) for flag, value in whole.items()), ("--seed", settings.seed, 0)]:
        if not least <= value < 2**31:
            raise UserError(f"{flag} must be a whole number of at least {least}, got {value}")
    if not 2 <= settings.sequence_length < 2**31:
        raise UserError(f"--sequence-length must be a whole number of at least 2, got {settings.sequence_length}")
    if not (math.isfinite(settings.learning_rate) and settings.learning_rate > 0):
        raise UserError(f"--learning-rate must be a finite number above 0, got {settings.learning_rate}")
    if settings.precision not in inputs.PRECISIONS:
        raise UserError(f"--precision must be one of {', '.join(inputs.PRECISIONS)}, got {settings.precision}")
    try:
        options = DistillationLoss(**settings.loss).options
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    _check_sources(settings, options.kd_weight != 0)
    initial_models.check_packages("train")
    output_folder.check(settings.output, (LOG, REPORT, PLOT))


def _check_sources(settings: Settings, needs_teacher: bool) -> None:
    if settings.teacher is not None and settings.teacher_cache is not None:
        raise UserError("--teacher and --teacher-cache are both given; the cache is there in place of the teacher")
    if settings.teacher is None and settings.teacher_cache is None and needs_teacher:
        raise UserError("there is no teacher: pass --teacher or --teacher-cache, or --kd-weight 0 --ce-weight 1 for the text alone")
    if settings.tail is not None and settings.teacher_cache is None:
        raise UserError("--tail is of a --teacher-cache of top-k log-probabilities")
    if settings.student is None and settings.teacher is None:
        raise UserError(inputs.NO_STUDENT)
    if settings.student is not None and settings.student_layers is not None:
        raise UserError("--student-layers are of the teacher, from which no student is cut if --student is given")
    if settings.teacher_cache is None and settings.text is None:
        raise UserError("there is no text: pass --text FILE")
    if settings.teacher_cache is not None and (settings.text is not None or settings.held_out is not None):
        raise UserError("--teacher-cache brings the text that the teacher has read; leave out --text and --held-out")


def _where_to_begin(settings: Settings) -> Path | None:
    """The last whole checkpoint, None for the beginning."""
    output = settings.output
    whole = checkpoints.checkpoints(output)
    there = [output / name for name in (LOG, REPORT, STUDENT) if (output / name).exists()] + whole
    if there and not settings.resume:
        raise UserError(f"--output {output} holds a run already ({there[0].name}); pass --resume to go on with it, or another folder")
    return whole[-1] if whole else None


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Refuses a second run in the same folder; the system releases the lock of one that was killed."""
    import fcntl

    with output_folder.unwritable(output):
        lock = (output / LOCK).open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--output {output} is being written to by another run; wait for it, or choose another folder") from error
        yield


@contextlib.contextmanager
def _log(output: Path, done: int) -> Iterator[TextIO]:
    """The log, open to be continued; records of steps after `done`, which will be made again, are removed first."""
    kept = "".join(json.dumps(record) + "\n" for record in _read_log(output) if record["step"] <= done and (done or record["step"]))
    output_folder.write_files(output, {LOG: lambda path: path.write_text(kept, encoding="utf-8")})
    with output_folder.unwritable(output):
        file = (output / LOG).open("a", encoding="utf-8")
    with file:
        yield file


def _write(log: TextIO, record: Mapping[str, float], to_disk: bool) -> None:
    """A line of JSON. to_disk: before a checkpoint, which must not outlast the records of its steps."""
    with output_folder.unwritable(Path(log.name).parent):
        log.write(json.dumps(record) + "\n")
        log.flush()
        if to_disk:
            os.fsync(log.fileno())


def _read_log(output: Path) -> list[dict[str, float]]:
    """Whole lines only: the last one may have been cut off."""
    if not (output / LOG).exists():
        return []
    lines = (output / LOG).read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise UserError(f"{output / LOG} is damaged: {error}; remove the folder to begin anew") from error
