"""What runs before the layers of an image classifier, where that is a chain of modules: the stem of a ResNet.

Its feature maps are the largest of the model. So where the task's gradient is to reach it, it runs without a graph as
the blocks do, and again, a module at a time, when the first block has handed its cotangent back.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lopt_hf.local.run_state import (
    RandomState,
    autocast_of,
    changed_between,
    relative_difference,
    running_statistics_kept,
)
from lopt_hf.local.stacks import DecoderStack, is_image_classifier
from lopt_hf.local.twin import TRACE_ERRORS, first_layer_of, run_twin

__all__ = ["Stem", "StemRun", "find_stem"]


def find_stem(model: PreTrainedModel, stack: DecoderStack) -> list[nn.Module]:
    """Finds the modules before an image classifier's layers, if each is given what the one before it returns.

    Args:
        model: The model.
        stack: Its layers, and the module that runs them.

    Returns:
        The modules in the order in which they run; none where something else is computed between them (positions that
        are added to patches), or of a language model.
    """
    if not is_image_classifier(model):
        return []
    watched = _Watch()
    decoder: Any = stack.decoder
    try:
        _, (args, kwargs) = run_twin(type(decoder), decoder.config, first_layer_of(stack), watched.watch)
    except TRACE_ERRORS:  # it keeps its graph then
        return []
    return [decoder.get_submodule(name) for name in watched.chain([*args, *kwargs.values()])]


class _Watch:
    """Notes what the modules without children of a decoder's twin are given, and what they return."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, list[Any], Any]] = []

    def watch(self, twin: nn.Module) -> None:
        """Begins with a twin that has not run."""
        for name, module in twin.named_modules():
            if not any(module.children()):
                module.register_forward_hook(partial(self._note, name), with_kwargs=True)

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._calls.append((name, [*args, *kwargs.values()], output))

    def chain(self, first_layer_values: Sequence[Any]) -> list[str]:
        """Returns the names of the modules that ran, if they are a chain that ends at the first layer."""
        given = [*(values for _, values, _ in self._calls), list(first_layer_values)]
        outputs = (output for _, _, output in self._calls)
        is_chain = all(len(values) == 1 for values in given) and all(
            values[0] is output for values, output in zip(given[1:], outputs, strict=True)
        )
        return [name for name, _, _ in self._calls] if is_chain else []


@dataclass
class StemRun:
    """A stem's run without a graph, and what it takes to run it again.

    Attributes:
        input: What its first module was given.
        random_state: The random state before it.
        autocast: The arguments of the autocast context that it ran in.
        output: What the last of its modules that have run returned.
    """

    input: torch.Tensor
    random_state: RandomState
    autocast: dict[str, Any]
    output: torch.Tensor


class Stem:
    """Writes down how the modules before the layers run, and runs them again.

    Args:
        modules: The modules, from `find_stem`.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._is_awaited = self._is_checked = False
        self._run: StemRun | None = None
        self.handles: list[RemovableHandle] = [self._modules[0].register_forward_pre_hook(self._begin)]
        self.handles += [module.register_forward_hook(self._leave_module) for module in self._modules]

    @property
    def learns(self) -> bool:
        """Whether anything of it is trained."""
        return _learns(self._modules)

    def enter(self) -> None:
        """Begins to write down a run, without a graph, which is to follow."""
        self._is_awaited = True

    def leave(self, hidden_BTD: torch.Tensor) -> StemRun | None:
        """Ends what `enter` began; returns the run, `None` if none has begun.

        Args:
            hidden_BTD: What the first layer is given.

        Raises:
            RuntimeError: If that is not what the stem has returned.
        """
        run, was_awaited = self._run, self._is_awaited
        self.forget()
        if was_awaited and (run is None or run.output is not hidden_BTD):
            raise RuntimeError(changed_between("Before its layers"))
        return run

    def forget(self) -> None:
        """Forgets a run that an error has ended."""
        self._run, self._is_awaited = None, False

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._is_awaited:
            pixels_BCHW: torch.Tensor = args[0]
            autocast = autocast_of(pixels_BCHW.device.type)
            self._run = StemRun(pixels_BCHW, RandomState.now(pixels_BCHW), autocast, pixels_BCHW)

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._run is not None:
            if args[0] is not self._run.output:
                raise RuntimeError(changed_between("Before its layers"))
            self._run.output = output

    def learn(
        self,
        run: StemRun,
        cotangent_BTD: torch.Tensor,
        around_backward: Callable[[], AbstractContextManager[None]],
        check_replay: Callable[[torch.Tensor], None],
    ) -> None:
        """Runs it again, and each module once more with a graph, from the last one on, which gives the gradients.

        Args:
            run: Its first run.
            cotangent_BTD: The gradient at its output.
            around_backward: Makes the context for the backward of a module.
            check_replay: Raises if it gives something else than at first; called once, with the norm of the difference
                relative to the output's.
        """
        output, starts = self._run_again(run)
        if not self._is_checked:
            self._is_checked = True
            check_replay(relative_difference(run.output, output))
        del output
        cotangent: torch.Tensor | None = cotangent_BTD
        for module in reversed(self._modules):
            if cotangent is not None:
                cotangent = self._learn_module(module, *starts.pop(), cotangent, run, around_backward)

    @torch.no_grad()
    def _run_again(self, run: StemRun) -> tuple[torch.Tensor, list[tuple[torch.Tensor, RandomState]]]:
        """Runs it without a graph; returns the output, and what each module is given with the random state before."""
        starts = []
        hidden = run.input
        with run.random_state.restored(), torch.autocast(**run.autocast), running_statistics_kept(self._modules):
            for index, module in enumerate(self._modules):
                learns = _learns(self._modules[:index])
                starts.append((hidden.detach().requires_grad_(learns), RandomState.now(hidden)))
                if index < len(self._modules) - 1 or not self._is_checked:
                    hidden = module(hidden)
        return hidden, starts

    def _learn_module(
        self,
        module: nn.Module,
        start: torch.Tensor,
        random_state: RandomState,
        cotangent: torch.Tensor,
        run: StemRun,
        around_backward: Callable[[], AbstractContextManager[None]],
    ) -> torch.Tensor | None:
        """Gives a module's weights their gradients; returns the cotangent at its input, if it asks for one."""
        with random_state.restored(), torch.autocast(**run.autocast), running_statistics_kept([module]):
            output = module(start)
        if not output.requires_grad:
            return None
        end = get_gradient_edge(output)
        del output  # a whole feature map, which the backward needs only if it has saved it
        with around_backward():
            torch.autograd.backward(end, cotangent)
        return start.grad


def _learns(modules: Sequence[nn.Module]) -> bool:
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())
