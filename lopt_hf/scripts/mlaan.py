"""Supervised fine-tuning with MLAAN: another name of `lopt-hf sft --method mlaan`.

```bash
lopt-hf mlaan --config smollm2-135m/mlaan/k4
lopt-hf mlaan --config smollm2-135m/mlaan/k4 --window 1 --leap_layers '[6, 4, 2]' --leap last
lopt-hf mlaan --accelerate_config ddp_2 --config ...
```
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trl import ModelConfig, TrlParser

from lopt_hf.common.settings import option
from lopt_hf.scripts.parsing import make_trl_parser
from lopt_hf.scripts.sft import SFTScriptArguments, make_trainer
from lopt_hf.scripts.training import run_training
from lopt_hf.trainers.configs import MLAANConfig

__all__ = ["MLAANScriptArguments", "main", "make_parser"]


@dataclass
class MLAANScriptArguments(SFTScriptArguments):
    """Which data to train on; the method is what the command is named after."""

    method: str = option("mlaan", "'mlaan'; `lopt-hf sft` has other methods.", ["mlaan"])


def make_parser() -> TrlParser:
    """Makes the parser of this command: the options of `lopt-hf sft --method mlaan`."""
    return make_trl_parser("mlaan", __doc__, MLAANScriptArguments, MLAANConfig, ModelConfig)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves and, if asked to, pushes a model."""
    run_training(make_parser(), argv, make_trainer)


if __name__ == "__main__":
    main()
