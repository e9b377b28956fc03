"""Arguments of GRPO with local learning."""

from dataclasses import dataclass, field

from trl import GRPOConfig

from lopt_hf.trainers.lopt_config import LocalLearningArguments

__all__ = ["LoPTGRPOConfig"]


@dataclass
class LoPTGRPOConfig(LocalLearningArguments, GRPOConfig):
    """Configuration of [`LoPTGRPOTrainer`]: every argument of [`~trl.GRPOConfig`] and those of local learning.

    Where TRL's default is not the paper's, the paper's is the default here. On a machine without an accelerator
    `use_cpu` is set, so that the defaults run.

    Parameters:
        learning_rate: Paper: 5e-6. Its released script has 1e-6, as TRL.
        num_generations: Completions per prompt. Paper: 4.
        temperature: Of sampling. Paper: 0.7.
        top_p: Of sampling. Paper: 0.95.
        epsilon: Where the probability ratio is clipped. Paper: 0.2, as TRL.
        beta: Weight of the KL divergence from the reference model. Paper: 0, no reference model, as TRL.
        loss_type: How the tokens' losses are averaged. Code: `"grpo"`, over each completion first.

    Raises:
        ValueError: If a value is out of range, or if `local_objective` is `"readout"`.
    """

    learning_rate: float = field(
        default=5e-6, metadata={"help": "The initial learning rate for AdamW (paper: 5e-6; released script: 1e-6)."}
    )
    num_generations: int | None = field(
        default=4,
        metadata={
            "help": "Completions per prompt (paper: 4). The number of processes times per_device_train_batch_size "
            "times gradient_accumulation_steps must be a multiple of it."
        },
    )
    temperature: float = field(default=0.7, metadata={"help": "Temperature of sampling (paper: 0.7)."})
    top_p: float = field(
        default=0.95, metadata={"help": "Sample from the likeliest tokens that sum to this probability (paper: 0.95)."}
    )
    epsilon: float = field(default=0.2, metadata={"help": "Where the probability ratio is clipped (paper: 0.2)."})
    beta: float = field(
        default=0.0, metadata={"help": "Weight of the KL divergence from a reference model (paper: 0, none)."}
    )
    loss_type: str = field(
        default="grpo",
        metadata={
            "help": "How the tokens' losses are averaged: 'grpo' over each completion first (released script), or "
            "another of GRPOConfig's, such as 'dapo', TRL's default."
        },
    )

    def _check_objective(self) -> None:
        if self.local_objective == "readout":
            raise ValueError(
                "local_objective='readout' does not fit GRPO: early blocks would learn to repeat every completion, "
                "whatever its reward; set it to 'reconstruction'."
            )
