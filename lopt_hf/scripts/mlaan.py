"""Supervised fine-tuning with MLAAN.

```bash
lopt-hf mlaan --config recipes/smollm2-135m/mlaan/k4.yaml
lopt-hf mlaan --config recipes/smollm2-135m/mlaan/k4.yaml --window 1 --leap_layers '[6, 4, 2]' --leap last
accelerate launch --config_file recipes/accelerate_configs/ddp_2.yaml -m lopt_hf.scripts.mlaan --config ...
```
"""

import sys
from collections.abc import Sequence
from typing import Any

from trl import ModelConfig, TrlParser

from lopt_hf.mlaan.config import MLAANConfig
from lopt_hf.mlaan.trainer import MLAANTrainer
from lopt_hf.scripts.parsing import parse_or_exit
from lopt_hf.scripts.sft import SFTDataArguments, resumed_checkpoint, train_and_save, trainer_inputs
from lopt_hf.trainers.checks import check_output_dir

__all__ = ["main", "make_parser"]


def make_parser() -> TrlParser:
    """The parser of this command: data, training and model arguments, and `--config file.yaml`."""
    dataclass_types: Any = (SFTDataArguments, MLAANConfig, ModelConfig)
    return TrlParser(dataclass_types, prog="lopt-hf mlaan", description=__doc__)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves and, if asked to, pushes a model.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    script_args, args, model_args = parse_or_exit(make_parser(), argv)
    try:
        checkpoint = resumed_checkpoint(args)
        check_output_dir(args.output_dir, checkpoint)
        model, given = trainer_inputs(script_args, args, model_args)
        trainer = MLAANTrainer(model, args, **given)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"lopt-hf mlaan: {error}")
    train_and_save(trainer, checkpoint, script_args.dataset_name)


if __name__ == "__main__":
    main()
