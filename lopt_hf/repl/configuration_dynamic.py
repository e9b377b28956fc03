"""The config of a RepL model whose surrogates still follow their neighbours."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from lopt_hf.repl.config import UNFOLDED_MODEL_TYPE

__all__ = ["RepLModelConfig"]


class RepLModelConfig(PreTrainedConfig):
    """Reads the config of an unfolded model into a subclass of its family's config, such as `LlamaConfig`.

    It carries, beside the family's own fields, `repl`: architecture and family, the layers that were replaced, and the
    fields of `RepLConfig`.
    """

    model_type = UNFOLDED_MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Makes the config of the family that `config_dict["repl"]` names."""
        from lopt_hf.repl.model import make_classes

        config_class, _ = make_classes(config_dict["repl"]["architecture"])
        return config_class.from_dict(config_dict, **kwargs)
