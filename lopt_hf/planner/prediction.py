"""A plan and a device's speed as plain numbers, for a process that has no other use for a planner."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lopt_hf.planner.device import measure_speed, read_speed, write_speed
from lopt_hf.planner.plan import PlanSettings, make_plan
from lopt_hf.planner.report import to_json

__all__ = ["Prediction", "measure_device"]

_SPEED = "speed.json"


def measure_device(folder: Path) -> dict[str, Any]:
    """Measures this machine's speed as `lopt-hf plan --calibrate` does, and saves it in `folder` for `Prediction`."""
    speed = measure_speed()
    write_speed(speed, folder / _SPEED)
    return asdict(speed)


@dataclass(frozen=True)
class Prediction:
    """A plan of one model; called with a folder, which may have the device's speed, it returns the plan.

    Attributes:
        config: The model's configuration, `model_type` included.
        settings: What to plan.
    """

    config: Mapping[str, Any]
    settings: PlanSettings

    def __call__(self, folder: Path) -> dict[str, Any]:
        """Returns the plan as `to_json` has it."""
        speed = folder / _SPEED
        values = dict(self.config)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        plan = make_plan(self.settings, config, read_speed(speed) if speed.exists() else None)
        content: dict[str, Any] = json.loads(to_json(plan))
        return content
