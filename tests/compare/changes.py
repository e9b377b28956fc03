"""Changes to a grid's YAML."""

from pathlib import Path
from typing import Any

import yaml

__all__ = ["change"]


def change(config: Path, **settings: Any) -> None:
    stored = yaml.safe_load(config.read_text(encoding="utf-8"))
    config.write_text(yaml.safe_dump({**stored, **settings}, sort_keys=False), encoding="utf-8")
