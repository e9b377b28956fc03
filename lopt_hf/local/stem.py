"""What runs before the layers of an image classifier, where that is a chain of modules: the stem of a ResNet.

Its feature maps are the largest of the model. So where the task's gradient is to reach it, it runs without a graph as
the blocks do, and again, a module at a time, when the first block has handed its cotangent back.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lopt_hf.common.random_state import RandomState
from lopt_hf.common.upstream.torch import BatchNorm, version_of
from lopt_hf.local.layer_calls import Call, evaluating, stop_at, unnoticed
from lopt_hf.local.ownership import TRACE_ERRORS
from lopt_hf.local.run_state import (
    autocast_of,
    changed_between,
    relative_difference,
    running_statistics_kept,
)
from lopt_hf.local.stacks import DecoderStack, example_image, is_image_classifier

__all__ = ["Stem", "StemRun", "find_stem"]


def find_stem(model: PreTrainedModel, stack: DecoderStack) -> list[nn.Module]:
    """Finds the modules before an image classifier's layers, if each is given what the one before it returns.

    The model runs on one image to see it, in evaluation, and stays as it is.

    Args:
        model: The model.
        stack: Its layers, and the module that runs them.

    Returns:
        The modules in the order in which they run; none of a language model, nor where one of them, run alone, could
        do something else than in the model: where more is computed before or between them (positions that are added
        to patches), where one writes into what it is given, or keeps something from run to run and is no batch norm.
    """
    if not is_image_classifier(model):
        return []
    weight = next(model.parameters())
    pixels_BCHW = example_image(model.config, weight.device).to(weight.dtype)
    calls: list[_Call] = []
    try:
        with torch.no_grad(), unnoticed(stack.decoder), evaluating(stack.decoder):
            args, kwargs = _run_until_layers(stack, pixels_BCHW, calls)
    except TRACE_ERRORS:  # of an architecture that wants more than pixels
        return []
    return [call.module for call in calls] if _is_chain(calls, pixels_BCHW, [*args, *kwargs.values()]) else []


def _run_until_layers(stack: DecoderStack, pixels_BCHW: torch.Tensor, calls: "list[_Call]") -> Call:
    """Returns the arguments of the first layer; the calls of modules without children before it are noted."""
    with ExitStack() as hooks:
        for module in stack.decoder.modules():
            if not list(module.children()):
                hooks.enter_context(module.register_forward_pre_hook(partial(_note, calls), with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(partial(_note_output, calls)))
        stopped = hooks.enter_context(stop_at(stack.layers[0]))
        stack.decoder(pixel_values=pixels_BCHW)
    return stopped[0]


@dataclass
class _Call:
    """How a module without children was called.

    Attributes:
        module: The module.
        given: What it was given.
        version: How often the first of that had been written into.
        output: What it returned.
    """

    module: nn.Module
    given: list[Any]
    version: int = 0
    output: Any = None

    @property
    def runs_alone(self) -> bool:
        """Whether it takes one tensor, leaves it as it is, and can run twice."""
        keeps_nothing = isinstance(self.module, BatchNorm) or not list(self.module.buffers())
        return len(self.given) == 1 and _version(self.given) == self.version and keeps_nothing


def _version(given: Sequence[Any]) -> int:
    return version_of(given[0]) if given and isinstance(given[0], torch.Tensor) else 0


def _note(calls: list[_Call], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = [*args, *kwargs.values()]
    calls.append(_Call(module, given, _version(given)))


def _note_output(calls: list[_Call], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    calls[-1].output = output


def _is_chain(calls: Sequence[_Call], pixels_BCHW: torch.Tensor, first_layer_values: Sequence[Any]) -> bool:
    """Tells whether calls lead from the pixels to what the first layer is given."""
    outputs = [pixels_BCHW, *(call.output for call in calls)]
    given = [*(call.given for call in calls), list(first_layer_values)]
    linked = all(len(values) == 1 and values[0] is output for values, output in zip(given, outputs, strict=True))
    return linked and all(call.runs_alone for call in calls)


@dataclass
class StemRun:
    """A stem's run without a graph, and what it takes to run it again.

    Attributes:
        input: What its first module was given.
        version: How often that had been written into.
        random_state: The random state before it.
        autocast: The arguments of the autocast context that it ran in.
        output: What the last of its modules that have run returned.
    """

    input: torch.Tensor
    version: int
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

    def enter(self, given: Iterable[Any]) -> bool:
        """Begins to write down a run without a graph, if it is to run again.

        Args:
            given: What the decoder is given.

        Returns:
            Whether it is: not if it learns nothing, or if what is before it learns (a part of the model around it).
        """
        needs_graph = any(isinstance(value, torch.Tensor) and value.requires_grad for value in given)
        self._is_awaited = _learns(self._modules) and not needs_graph
        return self._is_awaited

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
            state = RandomState.now(pixels_BCHW)
            self._run = StemRun(pixels_BCHW, version_of(pixels_BCHW), state, autocast, pixels_BCHW)

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

        Raises:
            RuntimeError: If the images have been written into in between.
        """
        if version_of(run.input) != run.version:
            raise RuntimeError(
                "The images of this micro-batch have been written into before its backward, which needs them as they "
                "were; keep them until then, or set reach_recompute to False."
            )
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
