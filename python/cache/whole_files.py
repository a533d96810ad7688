"""Files that are there whole or not at all, and the lock of those who write them.

A file is written beside its place under a name of its own, brought to the disk and renamed, so that whoever dies in between leaves either
no file or the whole of it. What a dead writer has left is removed by the next.
"""

import contextlib
import hashlib
import json
import os
import socket
from pathlib import Path
from types import TracebackType

from distill_kernels.api.cache import layout
from distill_kernels.api.cache.layout import CacheError, CachePlan, Manifest


def partial_name(name: str, writer: str) -> str:
    return f".{name}.{writer}.partial"


def write_whole(path: Path, data: bytes, writer: str) -> Manifest:
    """Write a file, replacing what is there; returns its name, size and sha256. `writer`: who, in the name of the file in between.

    Raises CacheError if it cannot be written, for instance to a full disk; what was at the path stays then.
    """
    partial = path.with_name(partial_name(path.name, writer))
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CacheError(
            f"{path} cannot be written: {error.strerror}; files that were whole are kept, and the same call goes on from there"
        ) from error
    return {"name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def manifest_name(name: str) -> str:
    return f"{name}.json"


def read(path: Path) -> bytes | None:
    """None where there is no such file, which another rank may remove at any moment."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def manifests(folder: Path, plan: CachePlan) -> dict[str, Manifest]:
    """Those of the files of an unfinished cache that are whole, by the file's name. One that is damaged is as good as none."""
    found: dict[str, Manifest] = {}
    for name in plan.files:
        content = read(folder / manifest_name(name))
        manifest = None if content is None else layout.parse_manifest(content)
        size = (folder / name).stat().st_size if (folder / name).exists() else None
        if manifest is not None and manifest["name"] == name and manifest["bytes"] == size:
            found[name] = manifest
    return found


def _sync_folder(folder: Path) -> None:
    """Without it a rename may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WriterLock:
    """One writer for each rank of one world at a time, in a folder: `with WriterLock(folder, rank, world_size): ...`.

    Every writer holds a file .writer-RANK-of-WORLD.lock (flock, which the system releases if the writer dies, and which Linux passes on to
    an NFS server). One with the same rank, and all of a world of another size, are refused; raises CacheError saying who holds it.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.folder = folder
        self.world = f"of-{world_size}"
        self.name = f"{rank}-{self.world}"
        self.path = folder / f".writer-{self.name}.lock"
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "rank": rank, "world_size": world_size}

    def __enter__(self) -> "WriterLock":
        self.descriptor = self._try(self.path, os.O_RDWR | os.O_CREAT)
        while not self._is_in_place():
            os.close(self.descriptor)
            self.descriptor = self._try(self.path, os.O_RDWR | os.O_CREAT)
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.__exit__)
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, json.dumps(self.owner).encode(), 0)
            self._remove_the_dead()
            on_error.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None = None, error: BaseException | None = None, trace: TracebackType | None = None
    ) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)

    def _is_in_place(self) -> bool:
        """Not so if the last owner has removed the file between our opening and locking it: we would hold one that nobody sees."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _remove_the_dead(self) -> None:
        """What killed writers have left, ours and those of worlds of another size. Raises CacheError if one of those lives."""
        for path in self.folder.glob(".writer-*.lock"):
            if path.name.endswith(f"{self.world}.lock"):
                continue  # ours, or a rank beside us; if it is dead, whoever takes its place cleans up
            try:
                descriptor = self._try(path, os.O_RDWR)
            except FileNotFoundError:
                continue  # finished in this moment
            self._remove_partials(path.name.removeprefix(".writer-").removesuffix(".lock"))
            path.unlink(missing_ok=True)
            os.close(descriptor)
        self._remove_partials(self.name)

    def _remove_partials(self, writer: str) -> None:
        for partial in self.folder.glob(partial_name("*", writer)):
            partial.unlink(missing_ok=True)

    def _try(self, path: Path, flags: int) -> int:
        """A descriptor with the lock of a file."""
        import fcntl  # absent on Windows, where caches can be read

        descriptor = os.open(path, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 4096, 0).decode(errors="replace") or "which has just begun"
            os.close(descriptor)
            raise CacheError(f"{self.folder} is being written by another process, {owner}; wait for it, or take another folder") from error
        except OSError as error:
            os.close(descriptor)
            raise CacheError(f"{self.folder} is on a file system without file locks ({error.strerror}); choose another folder") from error
        return descriptor
