"""The heads: what early blocks learn through, beside the model and never in what is saved as the model."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lopt_hf.local.blocks import Block
from lopt_hf.local.objectives import LocalObjective, head_of

__all__ = ["HEADS_NAME", "LocalHeads"]

HEADS_NAME = "local_heads"  # what they are called as a part of a model


class LocalHeads(nn.ModuleDict):
    """The heads of the early blocks that learn in a process, by block index as text.

    Args:
        heads: The heads by block index.
        model: A model with which they share weights; those are the model's to save, and not theirs.
    """

    def __init__(self, heads: Mapping[int, nn.Module] | None = None, model: nn.Module | None = None) -> None:
        super().__init__({str(index): head for index, head in (heads or {}).items()})
        of_model = set() if model is None else {id(tensor) for tensor in _named_tensors(model).values()}
        self._shared = frozenset(name for name, tensor in _named_tensors(self).items() if id(tensor) in of_model)

    @classmethod
    def make(
        cls,
        objective: LocalObjective,
        hidden_size: int,
        blocks: Sequence[Block],
        seed: int,
        only: Sequence[Block] | None = None,
    ) -> "LocalHeads":
        """Makes one head for each early block from a seed of their own.

        The random state is restored afterwards, so that data order and dropout are those of the run without heads.

        Args:
            objective: What the heads are for; it makes them, if it has any.
            hidden_size: Width D of the hidden states.
            blocks: All blocks of the decoder; all but the last get a head.
            seed: Where the heads' random state starts.
            only: The early blocks that learn in this process; their heads are the same as if all were made.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            heads = {block.index: head_of(objective, hidden_size) for block in blocks[:-1]}
        kept = blocks[:-1] if only is None else only
        return cls({block.index: heads[block.index] for block in kept})

    def attach(self, model: nn.Module) -> None:
        """Makes the heads a part of a model, for an engine that shards, steps and saves what is in the model."""
        model.add_module(HEADS_NAME, self)

    def _is_in(self, model: nn.Module) -> bool:
        return dict(model.named_children()).get(HEADS_NAME) is self

    @contextlib.contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Makes the heads a part of a model for a while, unless they are already."""
        if self._is_in(model):
            yield
            return
        self.attach(model)
        try:
            yield
        finally:
            delattr(model, HEADS_NAME)

    @contextlib.contextmanager
    def hidden(self, model: nn.Module) -> Iterator[None]:
        """Takes the heads off a model for a while, if they are a part of it."""
        if not self._is_in(model):
            yield
            return
        delattr(model, HEADS_NAME)
        try:
            yield
        finally:
            self.attach(model)

    @contextlib.contextmanager
    def left_out(self, model: nn.Module) -> Iterator[None]:
        """Leaves the heads, which stay a part of a model, out of its state dict for a while."""

        def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            for name in [name for name in state if name.startswith(f"{prefix}{HEADS_NAME}.")]:
                del state[name]

        with model.register_state_dict_post_hook(leave_out):
            yield

    @staticmethod
    def is_name_of_head(name: str) -> bool:
        """Tells whether a parameter, by its name in a model that the heads are a part of, is a head's."""
        return f".{HEADS_NAME}." in f".{name}"

    def own_state(self) -> dict[str, torch.Tensor]:
        """Returns the heads' own weights: those that a resumed run cannot find in its model."""
        return {name: value for name, value in self.state_dict().items() if name not in self._shared}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Loads what `own_state` returned.

        Raises:
            ValueError: If a weight is missing.
        """
        missing = self.own_state().keys() - state.keys()
        if missing:
            raise ValueError(f"resume_from_checkpoint: {min(missing)!r} is missing in the saved local heads.")
        self.load_state_dict(state, strict=not self._shared)


def _named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    named = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return {name: tensor for tensors in named for name, tensor in tensors}
