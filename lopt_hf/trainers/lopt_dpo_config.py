"""Arguments of DPO with local learning."""

from dataclasses import dataclass

from trl import DPOConfig

from lopt_hf.trainers.lopt_config import LocalLearningArguments

__all__ = ["LoPTDPOConfig"]


@dataclass
class LoPTDPOConfig(LocalLearningArguments, DPOConfig):
    """Configuration of [`LoPTDPOTrainer`]: every argument of [`~trl.DPOConfig`] and those of local learning.

    The LoPT paper has no DPO; the defaults besides LoPT's are TRL's. On a machine without an accelerator `use_cpu` is
    set, so that the defaults run.

    Raises:
        ValueError: If a value is out of range, or if `local_objective` is `"readout"`.
    """

    def _check_objective(self) -> None:
        if self.local_objective == "readout":
            raise ValueError(
                "local_objective='readout' does not fit DPO: early blocks would learn the rejected answers as they "
                "learn the chosen ones; set it to 'reconstruction'."
            )
