"""Every result is one line of one JSON-lines file the moment it is known.

A stage writes its lines into a pipe (`emit`); the process that runs the stages reads them and appends them to the file (`Journal`). So a
stage that dies has lost nothing, there is one writer, and what a full disk refuses is kept and written once there is room.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PIPE = "GPU_SUITE_PIPE"  # in the environment of a stage: the descriptor to write to
Record = dict[str, Any]


def emit(**record: Any) -> None:
    """Of a stage: one result, at once. Without a pipe, as when a stage is called by hand, it is printed."""
    line = line_of(record)
    if PIPE in os.environ:
        os.write(int(os.environ[PIPE]), line)  # whole: shorter than what a pipe writes in one piece, or alone in it
    else:
        print(line.decode(), end="", flush=True)


def line_of(record: Record) -> bytes:
    return json.dumps(_strict(record), default=str).encode() + b"\n"


def _strict(value: Any) -> Any:
    """JSON has no numbers that are not finite: they become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _strict(one) for key, one in value.items()}
    return [_strict(one) for one in value] if isinstance(value, list | tuple) else value


class Journal:
    """The file and, whatever becomes of that, every record in memory."""

    def __init__(self, path: Path):
        self.path = path
        self.records: list[Record] = []
        self.refused: str | None = None  # why the last write failed
        self._unwritten = b""

    def add(self, record: Record) -> None:
        self.records.append(record)
        self._unwritten += line_of(record)
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                while self._unwritten:
                    # What a nearly full disk takes may end within a line: the rest follows it, whenever that is.
                    self._unwritten = self._unwritten[os.write(file, self._unwritten) :]
            finally:
                os.close(file)
            self.refused = None
        except OSError as error:
            self.refused = str(error)


def read(path: Path) -> list[Record]:
    """The records of a file; its last line may have been cut off."""
    return list(parsed(path.read_bytes().splitlines()))


def parsed(lines: Iterable[bytes]) -> Iterable[Record]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
