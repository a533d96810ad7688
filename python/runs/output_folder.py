"""The folder that a command writes to: tried before the work begins, and its files are there whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from distill_kernels.api.user_error import UserError


def check(folder: Path, names: tuple[str, ...]) -> None:
    """Raises UserError unless `folder` can be written to and files of these names can be put there; creates nothing."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    # Asking for permission bits is not enough: file systems may be read-only or full.
    with unwritable(folder, existing), tempfile.TemporaryFile(dir=existing):
        pass
    for name in names:
        if (folder / name).is_dir():
            raise UserError(f"--output {folder} cannot be written to: {folder / name} is a folder")


def write_files(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Files by name, each made by calling its writer with the path of a temporary one; all are made before one is put in its place."""
    with unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as staging:
            for name, write in writers.items():
                write(Path(staging, name))
            for name in writers:
                os.replace(Path(staging, name), folder / name)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to write to, which takes the name `path` once all of it is on the disk.

    Whoever is killed in between leaves it under its temporary name, and the next call for the same path begins it anew.
    """
    staging = path.with_name(f".{path.name}.partial")
    with unwritable(path):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    try:
        with unwritable(path):
            yield staging
            for entry in [*staging.rglob("*"), staging]:
                _to_disk(entry)
            staging.rename(path)
            _to_disk(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def unwritable(folder: Path, cause: Path | None = None) -> Iterator[None]:
    """Turns an OSError, a full disk for instance, into a UserError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--output {folder} cannot be written to: {reason if cause is None else f'{cause}: {reason}'}") from error


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
