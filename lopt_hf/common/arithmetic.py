"""In which type to multiply matrices, float32 or bfloat16: what is the faster on the machine at hand, by measuring.

bfloat16 is two to four times as fast as float32 where the processor has instructions for it, and up to fifty times
slower where it has none; neither its name nor its age says so, but two small products do.
"""

import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch  # at run time where it is used: settings are read, and help is shown, without its second of import

__all__ = [
    "DTYPE_HELP",
    "Arithmetic",
    "arithmetic_of",
    "choose_arithmetic",
    "choose_for_saved",
    "fit_to_machine",
    "measure_arithmetic",
    "pick_bf16",
    "read_dtype",
]

logger = logging.getLogger(__name__)

DTYPE_HELP = "Arithmetic: auto, the faster on this machine by measuring (bfloat16 on a GPU), float32 or bfloat16."
DTYPES = ("float32", "bfloat16")
_SPELLINGS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# Ours: the smallest product whose speed is close to that of a training step's; 30 ms where bfloat16 is emulated
_SIZE = 256
_REPEATS = 20
_FEWEST = 5
_SECONDS_PER_DTYPE = 0.03
_GAIN = 1.1  # ours: under autocast the weights are cast at every step, which has to be won back


@dataclass(frozen=True)
class Arithmetic:
    """The type that matrix products are computed in, and why.

    Attributes:
        dtype: `"float32"` or `"bfloat16"`; another only where weights were saved in it.
        device: Type of the device: `"cpu"`, `"cuda"` ...
        reason: Why this one, as a clause.
        gflops: Measured speed of each type in 10^9 operations per second; empty where nothing was measured.
    """

    dtype: str
    device: str
    reason: str
    gflops: Mapping[str, float] = field(hash=False)

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The type as torch's."""
        return _torch_dtype(self.dtype)

    @property
    def description(self) -> str:
        """Which and why, as a part of a sentence."""
        return f"{self.dtype} on {self.device}, {self.reason}"

    def __str__(self) -> str:
        return f"Arithmetic: {self.description}."


def read_dtype(text: str, known: str = "auto, float32 or bfloat16") -> str:
    """The name of a type, `"auto"`, `"float32"` or `"bfloat16"`, from that or from the short `fp32` or `bf16`.

    Args:
        text: What the user wrote.
        known: What the message says to use, where there is more.

    Raises:
        ValueError: If it is none of them.
    """
    name = _SPELLINGS.get(text, text)
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"dtype={text!r} is unknown; use {known}.")
    return name


def choose_arithmetic(dtype: str = "auto", device: str | None = None) -> Arithmetic:
    """The type that a user's choice means on the device at hand.

    Args:
        dtype: As `read_dtype` takes it; `"auto"` is what `measure_arithmetic` picks. bfloat16 is obeyed, with a
            warning where it is the slower one.
        device: Type of the device; default: the accelerator, or the CPU where there is none.

    Raises:
        ValueError: If `dtype` is unknown.
    """
    name, device = read_dtype(dtype), device or _device_at_hand()
    if name == "auto":
        return measure_arithmetic(device)
    if name == "float32":
        return Arithmetic(name, device, "as asked for", {})
    measured = measure_arithmetic(device)
    if measured.dtype != name:
        _warn_of_slow_bfloat16(measured)
    return Arithmetic(name, device, "as asked for", measured.gflops)


def measure_arithmetic(device: str | None = None) -> Arithmetic:
    """The type to compute in where nobody says which; measured once in a process.

    On a CPU it is the faster one, and float32 where there is little between them. On an accelerator it is bfloat16,
    which also halves the memory, unless the device has no instructions for it; nothing is timed there.

    Args:
        device: Type of the device; default: the accelerator, or the CPU where there is none.
    """
    device = device or _device_at_hand()
    return _measure_cpu() if device == "cpu" else _ask_accelerator(device)


def choose_for_saved(saved: str, what: str, device: str | None = None) -> Arithmetic:
    """The type to load weights in that are measured as they were saved.

    Args:
        saved: Type that they were saved in, as torch calls it.
        what: What was saved, for the reason.
        device: Type of the device; default: the accelerator, or the CPU where there is none.

    Returns:
        That type, but float32 for bfloat16 where it is the faster: every bfloat16 number is one of float32. Never
        bfloat16 for float32, since that would round the weights.
    """
    device = device or _device_at_hand()
    if saved == "bfloat16":
        measured = measure_arithmetic(device)
        if measured.dtype != saved:
            return measured
    return Arithmetic(saved, device, f"as {what} was saved", {})


def arithmetic_of(mixed_precision: str, weights: str, device: str) -> Arithmetic:
    """The type that a run computes in, with a warning where it is the slower one.

    Args:
        mixed_precision: As accelerate has it: `"no"`, `"bf16"`, `"fp16"` ...
        weights: Type of the weights, as torch calls it.
        device: Type of the device.
    """
    dtype = weights if mixed_precision == "no" else _SPELLINGS.get(mixed_precision, mixed_precision)
    if dtype not in DTYPES:
        return Arithmetic(dtype, device, "as asked for", {})
    measured = measure_arithmetic(device)
    return measured if measured.dtype == dtype else choose_arithmetic(dtype, device)


def pick_bf16(bf16: bool | None, fp16: bool) -> bool:
    """What a training argument `bf16` should be on a CPU.

    Args:
        bf16: As the user left it; TRL's configs have `None` for unset, which they would take for `True`.
        fp16: Likewise.

    Returns:
        The faster choice where nothing says which, by an argument or by `accelerate launch --mixed_precision`;
        otherwise `bf16` itself, with a warning where that is the slower.
    """
    if bf16 is None and not fp16:
        launched_as = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # without the option, too, it is "no"
        if launched_as == "no":
            chosen = measure_arithmetic("cpu")
            logger.info("%s", chosen)
            return chosen.dtype == "bfloat16"
        bf16 = launched_as == "bf16"  # another type counts where this is off
    if bf16:
        choose_arithmetic("bfloat16", "cpu")
    return bool(bf16)


def fit_to_machine(args: Any) -> None:
    """Sets `use_cpu` where there is no accelerator, and with `use_cpu` the faster choice of `bf16`, see `pick_bf16`.

    Args:
        args: Training arguments that transformers has not checked yet.
    """
    import torch

    # transformers refuses bf16, the default of TRL's configs, on a machine without an accelerator unless told that
    # this is meant.
    if not torch.accelerator.is_available():
        args.use_cpu = True
    if args.use_cpu:
        args.bf16 = pick_bf16(args.bf16, args.fp16)


def _torch_dtype(name: str) -> "torch.dtype":
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _device_at_hand() -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


@functools.cache
def _measure_cpu() -> Arithmetic:
    gflops = {name: 2e-9 * _SIZE**3 / seconds for name, seconds in _seconds_per_product().items()}
    speeds = " and ".join(f"{gflops[name]:.3g} GFLOP/s in {name}" for name in DTYPES)
    is_faster = gflops["bfloat16"] > _GAIN * gflops["float32"]
    name = "bfloat16" if is_faster else "float32"
    return Arithmetic(name, "cpu", f"one core of which multiplies matrices at {speeds}", gflops)


def _seconds_per_product() -> dict[str, float]:
    """The shortest time of a product in each type: what else the machine does can only make it longer."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several threads wait for each other a hundred times as long
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return {name: _shortest(_torch_dtype(name)) for name in DTYPES}
    finally:
        torch.set_num_threads(threads)


def _shortest(dtype: "torch.dtype") -> float:
    import torch

    a = torch.ones(_SIZE, _SIZE, dtype=dtype, device="cpu")  # drawn numbers would move the caller's seed
    times: list[float] = []
    # The first one prepares the kernel, and on a cold or busy machine alone takes longer than all should.
    while len(times) < _FEWEST or (len(times) < _REPEATS and sum(times) < _SECONDS_PER_DTYPE):
        start = perf_counter()
        torch.mm(a, a)
        times.append(perf_counter() - start)
    return min(times)


@functools.cache
def _ask_accelerator(device: str) -> Arithmetic:
    if _has_bfloat16(device):
        return Arithmetic("bfloat16", device, "which has instructions for it", {})
    return Arithmetic("float32", device, "which has no instructions for bfloat16", {})


def _has_bfloat16(device: str) -> bool:
    import torch

    if device in ("cuda", "xpu"):
        return bool(torch.get_device_module(device).is_bf16_supported(including_emulation=False))
    try:
        a = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
        torch.mm(a, a)
    except (RuntimeError, TypeError):
        return False
    return True


@functools.cache  # once
def _warn_of_slow_bfloat16(measured: Arithmetic) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    if not measured.gflops:
        logger.warning("bfloat16 was asked for on %s, %s.", measured.device, measured.reason)
        return
    logger.warning(
        "bfloat16 was asked for, but one core of this machine multiplies matrices at %.3g GFLOP/s in it and at %.3g "
        "in float32; leave the choice out, or set float32 (bf16=False), to be faster.",
        measured.gflops["bfloat16"],
        measured.gflops["float32"],
    )
