"""Files that are either the old one or the new one, whole, whatever happens while they are written.

The new content goes to a temporary file in the same folder (so the same file system), is flushed to the disk, and
takes the final name in one step; then the folder is flushed. The next write removes what a killed process left.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = re.compile(r"\.(?P<host>[0-9A-Za-z_.-]+)\.(?P<pid>[0-9]+)\.[0-9a-f]{16}\.vltmp")
ABANDONED_AFTER = 24 * 3600.0
"""Seconds without a write after which a temporary file of another machine (or of a reused process id) is removed."""

CANNOT = "cannot write"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file whole or not at all; text is stored as UTF-8.

    Raises OSError naming the path, and with a full disk the bytes needed and free; the previous file is then untouched.
    """
    content = data.encode() if isinstance(data, str) else data
    with atomic_path(path, need=len(content)) as temporary:
        temporary.write_bytes(content)


@contextmanager
def atomic_path(path: str | Path, *, need: int | None = None) -> Iterator[Path]:
    """Yield an empty temporary file beside `path` that takes its name when the block ends without an error.

    `need` is the size in bytes if it is known beforehand; it is only used in the message of a full disk.
    An error in the block leaves `path` as it was. Raises OSError naming `path`.
    """
    path = Path(path)
    temporary = path.parent / f".{_host()}.{os.getpid()}.{secrets.token_hex(8)}.vltmp"
    try:
        sweep(path.parent)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # not mkstemp: respect the umask
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # a writer may have put a file of its own in its place, which others cannot read
        _flush(temporary)
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as e:
        if e.errno is None or str(e.strerror).startswith(CANNOT):  # explained by a block inside
            raise
        raise _explained(e, path, temporary, need) from e
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: str | Path) -> int:
    """Remove the temporary files that killed processes left in a folder; return how many."""
    gone = 0
    for path in Path(folder).iterdir():
        found = TEMPORARY.fullmatch(path.name)
        if found and _abandoned(path, found["host"], int(found["pid"])):
            path.unlink(missing_ok=True)
            gone += 1
    return gone


def _abandoned(path: Path, host: str, pid: int) -> bool:
    if host == _host() and not _alive(pid):
        return True
    try:
        return time.time() - path.stat().st_mtime > ABANDONED_AFTER
    except FileNotFoundError:  # its writer finished meanwhile
        return False


def _alive(pid: int) -> bool:
    if os.name == "nt":  # signal 0 would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _host() -> str:
    return re.sub(r"[^0-9A-Za-z_.-]", "_", socket.gethostname()) or "localhost"


def _flush(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, path: Path, temporary: Path, need: int | None) -> OSError:
    text = f"{CANNOT} {path}: {error.strerror}"
    if error.errno in NO_ROOM:
        written = temporary.stat().st_size if temporary.exists() else 0
        wanted = f"{need:,} bytes" if need is not None else f"more than {written:,} bytes"
        free = shutil.disk_usage(path.parent).free
        text += f"; it needs {wanted}, {free:,} bytes are free. Free some space (or raise the file size limit)"
        text += f" and save again; {path.name} is as it was"
    elif not path.parent.is_dir():
        text += f"; the folder {path.parent} does not exist, create it first"
    return OSError(error.errno, text)
