"""What the package takes from the inside of transformers, its trainer aside."""

from transformers import PreTrainedConfig, PreTrainedModel

from lopt_hf.common.upstream.guard import Upstream

__all__ = ["TRANSFORMERS", "active_collector", "no_init_weights"]

TRANSFORMERS = Upstream("transformers", "5.23", "5.25")

with TRANSFORMERS.names():
    from transformers.initialization import no_init_weights

    # The outputs that the running forward collects, by name: hidden states, router logits.
    from transformers.utils.output_capturing import _active_collector as active_collector

TRANSFORMERS.check(
    PreTrainedModel,
    "_from_config",
    "_init_weights",
    "_keys_to_ignore_on_load_unexpected",
    "_no_split_modules",
    "_supports_attention_backend",
)
TRANSFORMERS.check(PreTrainedConfig(), "_attn_implementation", "_experts_implementation")
