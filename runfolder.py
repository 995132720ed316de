"""What keeps a run folder whole: one writer at a time, no half-written file, a log that goes on where the run does."""

import errno
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from data import DataError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = re.compile(r"\.tmp\d+$")  # names of files that are being written: write's and write_checkpoint's


def lock(path: Path) -> BinaryIO:
    """Take the lock file `path`, until it is closed or the process ends, however it ends. Raises DataError if another process has
    it. A record lock rather than flock: loader workers do not inherit it, which outlive a killed run by seconds."""
    file = open(path, "ab")
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.close()
            raise DataError(f"{path.parent}: in use by another process; wait until it ends, or choose another folder") from None
        print(f"note: {path.parent}: no locks here ({error.strerror}); let no second process write into it", file=sys.stderr)
    return file


def remove_leftovers(folder: Path, pattern: str = "**/*") -> None:
    """Remove what processes were writing when they were killed, of files whose names match. Only for whoever holds their lock."""
    for path in folder.glob(f"{pattern}.tmp*"):
        if TEMPORARY.search(path.name):
            path.unlink(missing_ok=True)


def write(path: Path, content: str | bytes | Image.Image) -> None:
    """Write a text, bytes or an image under a temporary name, then rename: a reader never sees half a file. Names that are not
    UTF-8 appear in a text with escapes. Raises OSError that names the file."""
    if isinstance(content, Image.Image):
        buffer = io.BytesIO()
        content.save(buffer, Image.registered_extensions()[path.suffix.lower()])
        content = buffer.getvalue()
    elif isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:  # a full disk's has no file name
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def open_log(path: Path, step: int) -> BinaryIO:
    """The log of a run that goes on with step `step`: one JSON object a line. What an interrupted run has logged of this and later
    steps goes; so does a line cut short."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if step and path.exists() else ():
        try:
            kept += [line] if json.loads(line)["step"] < step else []
        except (ValueError, TypeError, KeyError):
            pass
    write(path, b"".join(kept))
    return open(path, "ab", buffering=0)  # nothing is kept back: neither kill -9 nor a full disk can cut an earlier line


def log_entry(log: BinaryIO, entry: dict) -> None:
    """Append a line. Raises OSError that names the file."""
    line = json.dumps(entry).encode() + b"\n"
    try:
        if log.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(error.errno, error.strerror, log.name) from None


def last_line(error: Exception) -> str:
    """What an error says. One from a loader's worker process comes with the worker's whole traceback, and says it at the end."""
    return str(error).splitlines()[-1].removeprefix("data.DataError: ")
