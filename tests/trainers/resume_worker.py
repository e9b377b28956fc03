"""One training run in a process of its own, which may kill itself: `python -m tests.trainers.resume_worker ...`."""

import argparse
import os
import signal

from transformers import TrainerCallback

import tests.conftest  # noqa: F401  (offline, one thread)
from tests.trainers.helpers import make_trainer


class KillAt(TrainerCallback):
    """SIGKILL in the middle of an optimizer step: gradients are there, weights not yet changed."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--num-blocks", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    trainer = make_trainer(
        options.output_dir,
        num_blocks=options.num_blocks,
        gradient_accumulation_steps=options.accumulation,
        max_steps=8,
        save_strategy="steps",
        save_steps=4,
        logging_steps=3,  # the checkpoint falls between two logs
        lr_scheduler_type="cosine",
        per_device_train_batch_size=2,
        trainer_kwargs={"callbacks": [KillAt(options.kill_at)]},
    )
    trainer.train(resume_from_checkpoint=options.resume or None)


if __name__ == "__main__":
    main()
