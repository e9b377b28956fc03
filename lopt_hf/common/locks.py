"""A lock on a run's folder, which the system frees when the process that holds it ends, however it ends."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["FolderInUseError", "run_lock"]

LOCK_FILE = "_run.lock"  # what begins with an underscore is not pushed to the hub


class FolderInUseError(ValueError):
    """Another run uses the folder."""


@contextlib.contextmanager
def run_lock(output_dir: str) -> Iterator[None]:
    """Keeps a second run out of a folder while this block runs: each would remove what the other is writing.

    Args:
        output_dir: The folder; it is made if it is not there.

    Raises:
        FolderInUseError: If another process is using it, whose number the message has.
    """
    path = Path(output_dir) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = path.with_suffix(".pid")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        number = holder.read_text(encoding="utf-8") if holder.is_file() else "unknown"
        raise FolderInUseError(
            f"output_dir={output_dir!r} is used by another run, process {number}; wait until it ends, or choose "
            "another output_dir."
        ) from error
    try:
        holder.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        path.unlink(missing_ok=True)  # while it is held: whoever comes now makes a new one
        lock.release()
