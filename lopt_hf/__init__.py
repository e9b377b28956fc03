"""Local learning for LLM post-training with Hugging Face.

The public names are loaded on first use, so that `import lopt_hf` and `lopt-hf --help` cost no import of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lopt_hf.repl.registration import register_when_transformers_is_loaded

__version__ = "0.1.0"

_EXPORTS = {
    "LoPTConfig": "lopt_hf.trainers.configs",
    "LoPTDPOConfig": "lopt_hf.trainers.configs",
    "LoPTDPOTrainer": "lopt_hf.trainers.dpo",
    "LoPTGRPOConfig": "lopt_hf.trainers.configs",
    "LoPTGRPOTrainer": "lopt_hf.trainers.grpo",
    "LoPTTrainer": "lopt_hf.trainers.sft",
    "LocalArguments": "lopt_hf.local.arguments",
    "LocalBatch": "lopt_hf.local.objectives",
    "LocalDPOTrainer": "lopt_hf.trainers.dpo",
    "LocalGRPOTrainer": "lopt_hf.trainers.grpo",
    "LocalImageConfig": "lopt_hf.trainers.image",
    "LocalImageTrainer": "lopt_hf.trainers.image",
    "LocalLearner": "lopt_hf.local.learner",
    "LocalObjective": "lopt_hf.local.objectives",
    "LocalSFTTrainer": "lopt_hf.trainers.sft",
    "LocalTrainingArguments": "lopt_hf.trainers.configs",
    "MLAANConfig": "lopt_hf.trainers.configs",
    "MLAANImageConfig": "lopt_hf.trainers.image",
    "MLAANPipelineConfig": "lopt_hf.pipeline.runtime.config",
    "MLAANPipelineTrainer": "lopt_hf.pipeline.runtime.trainer",
    "MLAANTrainer": "lopt_hf.trainers.sft",
    "Method": "lopt_hf.local.methods.base",
    "ObjectiveWithHead": "lopt_hf.local.objectives",
    "PipelineArguments": "lopt_hf.pipeline.runtime.arguments",
    "PipelineConfig": "lopt_hf.pipeline.runtime.config",
    "PipelineTrainer": "lopt_hf.pipeline.runtime.trainer",
    "PlanSettings": "lopt_hf.planner.plan",
    "ReadoutObjective": "lopt_hf.local.readout",
    "ReconstructionObjective": "lopt_hf.local.objectives",
    "RepLConfig": "lopt_hf.repl.config",
    "RepLModel": "lopt_hf.repl.model",
    "RepLTrainer": "lopt_hf.repl.trainer",
    "RetentionCallback": "lopt_hf.retention.callback",
    "StageTrainer": "lopt_hf.pipeline.runtime.trainer",
    "get_repl_model": "lopt_hf.repl.mapping",
    "make_plan": "lopt_hf.planner.plan",
}
__all__ = [
    "LoPTConfig",
    "LoPTDPOConfig",
    "LoPTDPOTrainer",
    "LoPTGRPOConfig",
    "LoPTGRPOTrainer",
    "LoPTTrainer",
    "LocalArguments",
    "LocalBatch",
    "LocalDPOTrainer",
    "LocalGRPOTrainer",
    "LocalImageConfig",
    "LocalImageTrainer",
    "LocalLearner",
    "LocalObjective",
    "LocalSFTTrainer",
    "LocalTrainingArguments",
    "MLAANConfig",
    "MLAANImageConfig",
    "MLAANPipelineConfig",
    "MLAANPipelineTrainer",
    "MLAANTrainer",
    "Method",
    "ObjectiveWithHead",
    "PipelineArguments",
    "PipelineConfig",
    "PipelineTrainer",
    "PlanSettings",
    "ReadoutObjective",
    "ReconstructionObjective",
    "RepLConfig",
    "RepLModel",
    "RepLTrainer",
    "RetentionCallback",
    "StageTrainer",
    "get_repl_model",
    "make_plan",
]

if TYPE_CHECKING:
    from lopt_hf.local.arguments import LocalArguments
    from lopt_hf.local.learner import LocalLearner
    from lopt_hf.local.methods.base import Method
    from lopt_hf.local.objectives import LocalBatch, LocalObjective, ObjectiveWithHead, ReconstructionObjective
    from lopt_hf.local.readout import ReadoutObjective
    from lopt_hf.pipeline.runtime.arguments import PipelineArguments
    from lopt_hf.pipeline.runtime.config import MLAANPipelineConfig, PipelineConfig
    from lopt_hf.pipeline.runtime.trainer import MLAANPipelineTrainer, PipelineTrainer, StageTrainer
    from lopt_hf.planner.plan import PlanSettings, make_plan
    from lopt_hf.repl.config import RepLConfig
    from lopt_hf.repl.mapping import get_repl_model
    from lopt_hf.repl.model import RepLModel
    from lopt_hf.repl.trainer import RepLTrainer
    from lopt_hf.retention.callback import RetentionCallback
    from lopt_hf.trainers.configs import LocalTrainingArguments, LoPTConfig, LoPTDPOConfig, LoPTGRPOConfig, MLAANConfig
    from lopt_hf.trainers.dpo import LocalDPOTrainer, LoPTDPOTrainer
    from lopt_hf.trainers.grpo import LocalGRPOTrainer, LoPTGRPOTrainer
    from lopt_hf.trainers.image import LocalImageConfig, LocalImageTrainer, MLAANImageConfig
    from lopt_hf.trainers.sft import LocalSFTTrainer, LoPTTrainer, MLAANTrainer

register_when_transformers_is_loaded()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
