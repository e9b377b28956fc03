"""How fast a folded RepL model with random weights generates, beside the model that it was made from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_hf.bench.gpu.training import make_model

__all__ = ["Generation"]


@dataclass(frozen=True)
class Generation:
    """One comparison, ready to be called as a case's `run`.

    Attributes:
        config: The model's configuration, `model_type` included.
        every: Every n-th layer is replaced.
        batch_size: Prompts at a time.
        prompt_tokens: Tokens of each.
        tokens: Tokens generated after it.
        rounds: Timed turns of each model, after one untimed.
        device: `"cuda"` or `"cpu"`.
    """

    config: Mapping[str, Any]
    every: int
    batch_size: int
    prompt_tokens: int
    tokens: int
    rounds: int
    device: str

    def __call__(self, folder: Path) -> dict[str, Any]:
        """Generates with both models in turns; returns seconds of each turn and the speed-up."""
        import statistics

        import torch

        from lopt_hf.bench.repl import time_generation
        from lopt_hf.repl.config import RepLConfig
        from lopt_hf.repl.mapping import get_repl_model

        model, other = (make_model(self.config, "bfloat16", self.device, seed=0).eval() for _ in range(2))
        # What the surrogates start from changes no arithmetic.
        config = RepLConfig(placement="every", every=self.every, init="skip")
        folded = get_repl_model(other, config).merge_and_unload().eval()
        shape = (self.batch_size, self.prompt_tokens)
        prompts_BT = torch.randint(3, self.config["vocab_size"], shape, device=self.device)
        full_seconds, folded_seconds = time_generation((model, folded), prompts_BT, self.tokens, self.rounds)
        pairs = zip(full_seconds, folded_seconds, strict=True)
        new_tokens = self.batch_size * self.tokens
        return {
            "layers": model.config.num_hidden_layers,
            "replaced": model.config.num_hidden_layers - folded.config.num_hidden_layers,
            "full_seconds": full_seconds,
            "folded_seconds": folded_seconds,
            "full_tokens_per_second": new_tokens / statistics.median(full_seconds),
            "folded_tokens_per_second": new_tokens / statistics.median(folded_seconds),
            "speedup": statistics.median(full / folded for full, folded in pairs),
        }
