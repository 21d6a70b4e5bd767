"""Files of results: one run at a time writes to each, and a file is replaced only when the new one is whole."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def fcntl() -> Any:
    """The module fcntl. Raises RuntimeError where there is none."""
    try:
        import fcntl as module
    except ImportError as error:
        raise RuntimeError(
            "files of results are locked with fcntl, which this platform does not have: run it on Linux or macOS"
        ) from error
    return module


def try_lock(file: IO[bytes], path: Path, *part: int) -> bool:
    """Locks an open file, or `part` of it (length and start), until it is closed. False where another process has it.

    The system drops the lock when the process ends, however it ends.

    Raises:
        OSError: the file system has no locks.
        RuntimeError: the platform has no locks.
    """
    module = fcntl()
    try:
        module.lockf(file, module.LOCK_EX | module.LOCK_NB, *part)
    except (BlockingIOError, PermissionError):  # both stand for a lock that another process holds
        return False
    except OSError as error:
        raise OSError(f"{path} cannot be locked ({error}): choose a folder on another file system") from error
    return True


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keeps other runs from writing to `path`, a file or a folder, while the body runs.

    The lock is one on the file `path`.lock beside it, which holds the number of the process and is removed at the end.
    One that a dead process left behind is locked by nobody and stops nobody.

    Raises:
        OSError: the lock cannot be made, or the file system has no locks.
        RuntimeError: another process holds `path`, or the platform has no locks.
    """
    path = path.resolve()  # of a link, the file behind it is held
    lock = path.with_name(f"{path.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(lock, "ab+") as file:
            if not try_lock(file, lock):
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "another process"
                raise RuntimeError(f"{path} is being written by {holder}, which holds {lock}: wait until it has ended")
            if not _is(file, lock):
                continue  # the run that held it ended just now, and has removed it
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                file.flush()
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is(file: IO[bytes], path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a new file beside `path`, with its suffix, and puts it in the place of `path` at the end.

    Where the body raises, the new file goes and `path` stays as it was.
    """
    path = path.resolve()  # of a link, the file behind it is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.stem}.new{os.getpid()}{path.suffix}")
    try:
        yield new
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            new.chmod(path.stat().st_mode)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Replaces the text of a file, or leaves the file as it was."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")
