"""Records that an earlier command kept as JSON; a damaged one is named, and where it can be it is made again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

__all__ = ["read_measured", "read_record"]

logger = logging.get_logger(__name__)


def read_record(path: Path, remedy: str) -> dict[str, Any]:
    """Reads the mapping that a JSON file holds.

    Args:
        path: The file.
        remedy: What to do about a damaged one.

    Raises:
        ValueError: If it holds none, as after the disk failed or somebody edited it; names the file.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}.") from error
    if not isinstance(record, Mapping):
        raise ValueError(f"{path} is damaged (it holds no `name: value` pairs); {remedy}.")
    return dict(record)


def read_measured(path: Path, *names: str) -> dict[str, Any] | None:
    """Reads what was measured earlier.

    Args:
        path: The file.
        names: What it has to hold.

    Returns:
        `None` where there is none, or it is damaged, which is warned of, as it takes the time of measuring again.
    """
    if not path.is_file():
        return None
    try:
        record = read_record(path, "what it holds is measured again")
        if missing := [name for name in names if name not in record]:
            raise ValueError(f"{path} is damaged (it has no {missing[0]!r}); what it holds is measured again.")
    except ValueError as error:
        logger.warning_once(str(error))  # the scores of a model are looked for more than once
        return None
    return record
