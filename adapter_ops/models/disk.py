"""Files that are replaced whole or not at all, and what saves that were killed have left."""

import contextlib
import hashlib
import os
import platform
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

_DAY = 24 * 60 * 60  # seconds


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes files, given by name, into a folder, which is made if it does not exist.

    Each is written beside its place and synchronised with the disk, and then all are renamed in their order. Temporary
    files that dead processes left there under these names are removed. The host and the process that write stand in a
    temporary file's name, so that others can tell whether it is needed.

    Raises OSError where the system cannot write: the files in place then stay whole, and nothing temporary is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in contents:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a folder, so no file can be written in its place")
    _remove_leftovers(folder, contents)
    mark = f"{os.getpid()}.{host()}{secrets.token_hex(8)}.tmp"
    temporary = {name: folder / f".{name}.{mark}" for name in contents}
    try:
        for name, content in contents.items():
            with open(temporary[name], "xb") as file:  # gets the mode that the umask gives
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in contents:
            os.replace(temporary[name], folder / name)
    finally:
        for left in temporary.values():
            left.unlink(missing_ok=True)
    _sync(folder)


def host() -> str:
    """Returns eight hexadecimal digits that identify this host, or this container if it numbers its own processes."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""  # not Linux
    return hashlib.sha256(f"{platform.node()} {processes}".encode()).hexdigest()[:8]


def _remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Removes temporary files of saves that were killed: of dead processes of this host, and of others after a day."""
    here, now = host(), time.time()
    known = re.compile(
        rf"\.(?:{'|'.join(map(re.escape, names))})\.([1-9][0-9]{{0,9}})\.([0-9a-f]{{8}})[0-9a-f]{{16}}\.tmp"
    )
    for entry in os.scandir(folder):
        found = known.fullmatch(entry.name)
        with contextlib.suppress(OSError):  # another save removed it first, or it belongs to another user
            if found and (
                (found[2] == here and not alive(int(found[1])))
                or now - entry.stat(follow_symlinks=False).st_mtime > _DAY
            ):
                os.unlink(entry.path)


def alive(process: int) -> bool:
    """Returns whether the process with this number runs on this host, or may run: True where that cannot be known."""
    if os.name == "nt":
        return True  # os.kill would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # another user's process, or a number that this system does not give
    return True


def _sync(folder: Path) -> None:
    """Makes the renames durable, where the file system can. The save has taken effect already."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
