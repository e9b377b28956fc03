"""Files and folders that appear complete or not at all: written beside their place and renamed into it."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["atomic_file", "is_disk_full", "publish_folder", "write_text"]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder; what was written there replaces `path` at the end of the block.

    Args:
        path: The file; its folder is made if it is not there.

    Raises:
        OSError: If the disk is full; the file stays as it was, and nothing half written is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_disk_full(error: BaseException) -> bool:
    """Tells whether an error means that there is no room left; torch and safetensors say so in words only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return os.strerror(errno.ENOSPC).lower() in str(error).lower()


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def publish_folder(staged: Path, final: Path) -> None:
    """Renames a finished folder, in place of an earlier one of that name.

    Args:
        staged: The folder, alone in a parent folder that is removed. If it is gone, another process has renamed it.
        final: Its new path, on the same file system.
    """
    if not staged.is_dir():
        return
    if final.exists():
        os.replace(final, staged.parent / f"{final.name}-replaced")
    with contextlib.suppress(FileNotFoundError):
        os.replace(staged, final)
    shutil.rmtree(staged.parent, ignore_errors=True)
