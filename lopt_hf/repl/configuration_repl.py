"""The config of a folded RepL model. Copied beside exported checkpoints: imports transformers and its pair only."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

__all__ = ["FoldedRepLConfig"]


class FoldedRepLConfig(PreTrainedConfig):
    """Reads the config of a folded model into a subclass of its family's config, such as `LlamaConfig`.

    It carries, beside the family's own fields, `repl`: the architecture that was folded, its family, and what
    surrogate stands before which layer.
    """

    model_type = "repl"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Makes the config of the family that `config_dict["repl"]` names."""
        from .modeling_repl import make_folded_classes

        config_class, _ = make_folded_classes(config_dict["repl"]["architecture"], FoldedRepLConfig.model_type)
        return config_class.from_dict(config_dict, **kwargs)
