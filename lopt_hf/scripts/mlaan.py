"""Supervised fine-tuning with MLAAN.

```bash
lopt-hf mlaan --config recipes/smollm2-135m/mlaan/k4.yaml
lopt-hf mlaan --config recipes/smollm2-135m/mlaan/k4.yaml --window 1 --leap_layers '[6, 4, 2]' --leap last
accelerate launch --config_file recipes/accelerate_configs/ddp_2.yaml -m lopt_hf.scripts.mlaan --config ...
```
"""

from collections.abc import Sequence

from trl import ModelConfig, TrlParser

from lopt_hf.scripts.parsing import make_trl_parser
from lopt_hf.scripts.sft import SFTDataArguments, load_split
from lopt_hf.scripts.training import prepare, run_training
from lopt_hf.trainers.configs import MLAANConfig
from lopt_hf.trainers.sft import MLAANTrainer

__all__ = ["main", "make_parser", "make_trainer"]


def make_parser() -> TrlParser:
    """The parser of this command: data, training and model arguments, and `--config file.yaml`."""
    return make_trl_parser("mlaan", __doc__, SFTDataArguments, MLAANConfig, ModelConfig)


def make_trainer(script_args: SFTDataArguments, args: MLAANConfig, model_args: ModelConfig) -> MLAANTrainer:
    """Builds the trainer from parsed arguments."""
    model, given = prepare(script_args, args, model_args, load_split)
    return MLAANTrainer(model, args, **given)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves and, if asked to, pushes a model."""
    run_training(make_parser(), argv, make_trainer)


if __name__ == "__main__":
    main()
