"""Runs the stages, each a process under a limit of its own, and keeps what they say.

    python -m benchmarks.gpu_suite OUT                # OUT/suite.jsonl, report.txt, report.png and log.txt
    python -m benchmarks.gpu_suite OUT --dry-run      # the same stages at tiny sizes, on CPU in Triton's interpreter
    python -m benchmarks.gpu_suite OUT --profile      # the second use of a machine: counters and sanitizer
    python -m benchmarks.gpu_suite --report FILE      # table and picture of a suite.jsonl, whole or cut off

A stage that hangs, crashes or cannot be compiled costs itself alone, and its line says so.
"""

import argparse
import contextlib
import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.gpu_suite import bundle, report, stages
from benchmarks.gpu_suite.journal import PIPE, Journal, Record, parsed, read
from benchmarks.gpu_suite.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
MINUTES, PROFILE_MINUTES = 7.0, 4.0
LEAST_SECONDS = 4.0  # a stage with less is not started
GRACE = 2.0  # after its limit, in which a stage can still say where it hangs
SAID = 1500  # characters of a failed stage's last words
JOURNAL = "suite.jsonl"
CORES = os.cpu_count() or 1


class Child:
    """The process of a stage. It imports what it needs at once, and does nothing until it is told to go."""

    def __init__(self, stage: Stage, command: Sequence[str], environment: dict[str, str], take: Callable[[Record], None]):
        self.stage = stage
        self._take, self._printed = take, b""
        reads, writes = os.pipe()
        self._process = subprocess.Popen(
            [*command, stage.name], env=environment | {PIPE: str(writes)}, pass_fds=(writes,), cwd=ROOT, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        os.close(writes)
        work = ((self._records, (reads,)), (self._output, ()))
        self._readers = [threading.Thread(target=of, args=given, daemon=True) for of, given in work]
        for reader in self._readers:
            reader.start()

    def _records(self, reads: int) -> None:
        with os.fdopen(reads, "rb") as lines:
            for record in parsed(lines):
                self._take({"stage": self.stage.name} | record)

    def _output(self) -> None:
        printed = self._process.stdout
        assert printed is not None
        for piece in iter(printed.readline, b""):
            self._printed += piece

    def run(self, limit: float) -> Record:
        """The stage's last line; whatever it has started ends with it."""
        begin, told = time.monotonic(), self._process.stdin
        assert told is not None
        with contextlib.suppress(BrokenPipeError):  # it died while it was importing
            told.write(f"{begin + limit}\n".encode())  # on a clock that all processes of a machine share
            told.close()
        try:
            ended = how_it_ended(self._process.wait(limit + GRACE))
        except subprocess.TimeoutExpired:
            ended = f"killed after {limit:.0f} s"
        finally:
            self.end()
        line = {"kind": "stage", "stage": self.stage.name, "ended": ended, "seconds": round(time.monotonic() - begin, 2)}
        printed = self._printed.decode(errors="replace")
        return line | ({} if ended == "done" else {"said": printed[-SAID:]}) | {"printed": printed}

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in a driver cannot be ended: the others go on
            self._process.wait(GRACE)
        for reader in self._readers:
            reader.join(GRACE)


def how_it_ended(code: int) -> str:
    if code == 0:
        return "done"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Run:
    """One use of a machine: its journal, its log, its clock."""

    def __init__(self, out: Path, command: Sequence[str], environment: dict[str, str], minutes: float):
        self.journal, self.log = Journal(out / JOURNAL), out / "log.txt"
        self._command, self._environment = command, environment
        self._begin = time.monotonic()
        self._end = self._begin + minutes * 60
        self._lock = threading.Lock()

    def take(self, record: Record) -> None:
        with self._lock:
            record = {"at": round(time.monotonic() - self._begin, 2)} | record
            self.journal.add(record)
            if (words := report.headline_of(record)) is not None:
                print(words, flush=True)

    def stages(self, wanted: Sequence[Stage], stop: Callable[[Sequence[Record]], str | None] = lambda records: None) -> None:
        """All of them, in order, those of a group at once, but no more than there are cores. `stop` is asked after each whether, and why,
        nothing more is to run."""
        groups = [list(group) for _, group in groupby(wanted, key=lambda stage: stage.group or stage.name)]
        groups = [group[i : i + CORES] for group in groups for i in range(0, len(group), CORES)]
        with contextlib.ExitStack() as started:
            coming = self._start(groups[0], started) if groups else []
            for place, group in enumerate(groups):
                children = coming or self._start(group, started)
                # The next one imports beside this one, for that is seconds of a minute.
                following = groups[place + 1] if place + 1 < len(groups) else []
                coming = self._start(following, started) if len(following) == 1 else []
                self._run(children)
                why = stop(self.journal.records)
                if why is not None:
                    self.take({"kind": "stopped", "why": why})
                    return

    def _start(self, group: Sequence[Stage], started: contextlib.ExitStack) -> list[Child]:
        children = []
        for stage in group:
            children.append(Child(stage, self._command, self._environment, self.take))
            started.callback(children[-1].end)
        return children

    def _run(self, children: Sequence[Child]) -> None:
        threads = [threading.Thread(target=self._run_one, args=(child,)) for child in children]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run_one(self, child: Child) -> None:
        limit = min(child.stage.seconds, self._end - time.monotonic() - GRACE)
        if limit < LEAST_SECONDS:
            child.end()
            self.take({"kind": "stage", "stage": child.stage.name, "ended": "no time left"})
            return
        line = child.run(limit)
        printed = line.pop("printed")
        self.take(line)
        with contextlib.suppress(OSError), self._lock, self.log.open("a") as log:
            log.write(f"== {child.stage.name}: {line['ended']}\n{printed}\n")


def run_stage(stage: Stage) -> None:
    """In the process of a stage."""
    module, function = stage.run.split(":")
    work = getattr(importlib.import_module(module), function)
    deadline = sys.stdin.readline()
    if not deadline:
        return  # whoever started it has gone
    # Its own word, before it is killed. What it has imported until now was on the same clock.
    faulthandler.dump_traceback_later(max(0.1, float(deadline) - time.monotonic()), exit=True)
    work(*stage.arguments)


def why_stop(dry: bool, without_cuda: bool) -> Callable[[Sequence[Record]], str | None]:
    """What must be there is looked for once, after the first stage, and not found out in the seventh minute."""

    def stop(records: Sequence[Record]) -> str | None:
        machine = next((record for record in records if record["kind"] == "machine"), None)
        if dry:
            return None
        if machine is None:
            return "the first stage did not say what machine this is"
        if machine["gpu"] is None:
            return "torch finds no GPU; --dry-run runs every stage at tiny sizes on CPU"
        if machine["extension"] != "loaded" and not without_cuda:
            return f"the compiled extension is missing ({machine['extension']}); `make gpu-bundle` builds it, --without-cuda does without"
        return None

    return stop


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on CPU where there is no GPU")
    parser.add_argument("--profile", action="store_true", help="counters of the slowest kernels, and the sanitizer on CUDA C++")
    parser.add_argument("--minutes", type=float, help=f"most time for everything: {MINUTES:g}, or {PROFILE_MINUTES:g} with --profile")
    parser.add_argument("--without-cuda", action="store_true", help="go on where the compiled extension is missing")
    parser.add_argument("--report", type=Path, metavar="FILE", help="make table and picture of a suite.jsonl, and run nothing")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    wanted = (stages.profile_stages if given.profile else stages.all_stages)(given.dry_run)
    if given.stage is not None:
        run_stage(next(stage for stage in wanted if stage.name == given.stage))
        return 0
    if given.report is not None:
        print(report.write(read(given.report), given.report.parent))
        return 0
    if given.out is None:
        parser.error("a folder for the results is wanted")
    if (given.out / JOURNAL).exists():
        parser.error(f"{given.out / JOURNAL} is of another run; name another folder, or remove it")
    if (why := bundle.why_outdated()) is not None:
        parser.error(why)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of what ends the children
    given.out.mkdir(parents=True, exist_ok=True)
    minutes = given.minutes or (PROFILE_MINUTES if given.profile else MINUTES)
    flags = ["--dry-run"] * given.dry_run + ["--profile"] * given.profile
    command = [sys.executable, "-m", "benchmarks.gpu_suite", *flags, "--stage"]
    environment = dict(os.environ) | ({"TRITON_INTERPRET": "1"} if given.dry_run else {})
    return run(wanted, given.out, command, environment, minutes, why_stop(given.dry_run, given.without_cuda))


def run(
    wanted: Sequence[Stage], out: Path, command: Sequence[str], environment: dict[str, str], minutes: float,
    stop: Callable[[Sequence[Record]], str | None] = lambda records: None,
) -> int:  # fmt: skip
    """Stages by `command` and their names, then the report. 1 where a stage or a verdict failed, or the disk kept something back."""
    use = Run(out, command, environment, minutes)
    try:
        use.stages(wanted, stop)
    finally:
        print(report.write(use.journal.records, out), flush=True)
    if use.journal.refused is not None:
        print(f"{use.journal.path} is not whole: {use.journal.refused}", flush=True)
        return 1
    return 1 if report.failures(use.journal.records) else 0
