"""Supervised fine-tuning by what a user could take instead of local learning: LISA, BAdam, OSF, end-to-end for less.

```bash
lopt-hf peers --method lisa --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/Capybara \\
    --output_dir out
lopt-hf peers --method badam --config smollm2-135m/sft/e2e --badam_period 8
lopt-hf peers --method e2e_segments --num_blocks 4 --config smollm2-135m/sft/e2e
```
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import TrainerState
from trl import ModelConfig, SFTTrainer, TrlParser

from lopt_hf.common.compared_methods import PEERS
from lopt_hf.common.resuming import find_checkpoint
from lopt_hf.common.settings import check_choice, option
from lopt_hf.common.upstream.trainers import TRAINER_STATE_NAME
from lopt_hf.data.prepared import say_what_was_cut
from lopt_hf.peers.arguments import PeerConfig
from lopt_hf.scripts.parsing import make_trl_parser
from lopt_hf.scripts.sft import SFTDataArguments, load_split
from lopt_hf.scripts.training import prepare, run_training

__all__ = ["PeerScriptArguments", "main", "make_parser"]


METHODS = (*PEERS, "osf")


@dataclass
class PeerScriptArguments(SFTDataArguments):
    """Which data to train on, and by which method.

    Parameters:
        method: `"lisa"`, `"badam"`; `"osf"`, PEFT's adapter that learns orthogonally to what each matrix mostly does;
            `"freeze_last"`, the reverse of freezing the early blocks; `"e2e_segments"`, checkpointing by segments of
            the decoder; `"e2e_step_in_backward"`, the optimizer's step in the backward.
    """

    method: str = option(
        "lisa",
        "lisa, badam, osf (an adapter), freeze_last (trains the first of num_blocks blocks), e2e_segments "
        "(checkpoints num_blocks segments), or e2e_step_in_backward.",
        METHODS,
    )

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)  # a YAML's is not compared with the choices


def make_parser() -> TrlParser:
    """Makes the parser of this command: script, training and model arguments, and `--config file.yaml`."""
    return make_trl_parser("peers", __doc__, PeerScriptArguments, PeerConfig, ModelConfig)


def make_trainer(script_args: PeerScriptArguments, args: PeerConfig, model_args: ModelConfig) -> SFTTrainer:
    """Builds TRL's trainer with the method's callback or adapter from parsed arguments.

    Raises:
        ValueError: If the run does not suit the method, or if the checkpoint to go on from was trained otherwise.
    """
    args.check_unused(script_args.method)
    model, given = prepare(script_args, args, model_args, partial(load_split, text_field=args.dataset_text_field))
    trainer = _make_trainer(script_args, args, model, given)
    if not args.packing:
        say_what_was_cut(given["train_dataset"], trainer.train_dataset, args.max_length)
    return trainer


def _make_trainer(script_args: PeerScriptArguments, args: PeerConfig, model: str, given: dict[str, Any]) -> SFTTrainer:
    if script_args.method == "osf":
        if given["peft_config"] is not None:
            raise ValueError("use_peft=True adds LoRA, and osf is an adapter itself; leave it out.")
        return SFTTrainer(model, args, **(given | {"peft_config": args.make_osf_config()}))
    peer = args.make_peer(script_args.method)
    trainer = SFTTrainer(model, args, callbacks=[peer], **given)
    checkpoint = find_checkpoint(str(args.output_dir), args.resume_from_checkpoint)
    if checkpoint is not None:
        peer.check_state(TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)))
    return trainer


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves and, if asked to, pushes a model."""
    run_training(make_parser(), argv, make_trainer)


if __name__ == "__main__":
    main()
