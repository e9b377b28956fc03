"""What the auxiliaries cost in memory, known before they are made."""

from collections.abc import Iterable, Sequence

import psutil
import torch
from torch import nn

__all__ = ["check_memory", "free_bytes", "planned_bytes"]

_STATES = 4  # a trained weight is kept with its gradient and AdamW's two moments


def planned_bytes(
    layers: nn.ModuleList,
    leaps: Iterable[Sequence[int]],
    averaged: Iterable[Sequence[int]],
    readout: tuple[int, int],
    translator: int,
) -> dict[str, int]:
    """Bytes that the auxiliaries will need beside the model, activations left out.

    Args:
        layers: The decoder layers; only their trainable weights are copied.
        leaps: The leapt layers of each block.
        averaged: Those of them with a moving average.
        readout: Bytes of one copy of norm and LM head, and how many of them are trained (0: one, frozen).
        translator: Bytes of one translator.
    """
    sizes = [sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad) for layer in layers]
    chosen = [list(indices) for indices in leaps]
    size, trained = readout
    return {
        "copies": _STATES * sum(sizes[index] for indices in chosen for index in indices),
        "translators": _STATES * translator * sum(len(indices) for indices in chosen),
        "averages": sum(sizes[index] for indices in averaged for index in indices),
        "readout": _STATES * trained * size if trained else size,
    }


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nothing occupies yet."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_memory(planned: dict[str, int], device: torch.device) -> str:
    """One line with the figures.

    Raises:
        ValueError: If the device has less memory than is planned.
    """
    total, free = sum(planned.values()), free_bytes(device)
    parts = ", ".join(f"{name} {value / 1e6:,.0f}" for name, value in planned.items())
    line = (
        f"MLAAN's auxiliaries need {total / 1e6:,.0f} MB beside the model ({parts}; what trains with gradients and "
        f"AdamW's moments), of {free / 1e6:,.0f} MB that {device} has free."
    )
    if total > free:
        raise ValueError(
            f"{line} Lower leap_layers, choose readout='frozen' or ema_layers='first', or train adapters (LoRA), "
            "whose auxiliaries copy adapters only."
        )
    return line
