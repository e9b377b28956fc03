"""How fast a device is: two short probes, saved as a small JSON file."""

import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import perf_counter

import torch

from lopt_hf.common.arithmetic import measure_arithmetic
from lopt_hf.common.files import write_text

__all__ = ["DeviceSpeed", "measure_speed", "read_speed", "write_speed"]

# Ours: large enough that starting a kernel does not count, small enough for a few seconds on two CPU cores.
_MATRIX = {"cpu": 1536, "accelerator": 8192}
_VECTOR = {"cpu": 2**24, "accelerator": 2**27}
_REPEATS = 7


@dataclass(frozen=True)
class DeviceSpeed:
    """The speed of a device in one data type.

    Attributes:
        device: Its type: `"cpu"`, `"cuda"` ...
        name: What it calls itself.
        flops_per_second: Of a large matrix product.
        bytes_per_second: Read and written, of an element-wise operation.
        dtype: The type in which both were measured, `"bfloat16"` or `"float32"`; `None` in files that do not say.
    """

    device: str
    name: str
    flops_per_second: float
    bytes_per_second: float
    dtype: str | None = None

    def seconds(self, flops: float, moved_bytes: float) -> float:
        """Time for matrix products, then for everything else, each at the device's full speed."""
        return flops / self.flops_per_second + moved_bytes / self.bytes_per_second


def measure_speed() -> DeviceSpeed:
    """Measures the accelerator of this machine, or its CPU where there is none; takes a few seconds.

    In the type that training would compute in there: bfloat16, unless the device is faster in float32.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator or torch.device("cpu")
    kind = "cpu" if device.type == "cpu" else "accelerator"
    size, length = _MATRIX[kind], _VECTOR[kind]
    arithmetic = measure_arithmetic(device.type)
    dtype = arithmetic.torch_dtype
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    x, y = (torch.randn(length, device=device, dtype=dtype) for _ in range(2))
    total = torch.empty_like(x)
    return DeviceSpeed(
        device=device.type,
        name=torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or device.type,
        flops_per_second=2 * size**3 / _median_seconds(lambda: torch.mm(a, b, out=product)),
        bytes_per_second=3 * x.nbytes / _median_seconds(lambda: torch.add(x, y, out=total)),
        dtype=arithmetic.dtype,
    )


def _median_seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        start = perf_counter()
        run()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(perf_counter() - start)
    return statistics.median(times[1:])  # the first one warms up


def write_speed(speed: DeviceSpeed, path: Path) -> None:
    """Saves a measurement."""
    write_text(path, json.dumps(asdict(speed), indent=2) + "\n")


def read_speed(path: Path) -> DeviceSpeed:
    """Reads a saved measurement.

    Raises:
        ValueError: If there is none at `path`.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values = {"dtype": None, **values}  # which older files lack
        speed = DeviceSpeed(**{field.name: values[field.name] for field in fields(DeviceSpeed)})
        rates = (float(speed.flops_per_second), float(speed.bytes_per_second))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"calibration={str(path)!r} is no measurement of `lopt-hf plan --calibrate FILE` ({error}); make one."
        ) from error
    if min(rates) <= 0:
        raise ValueError(f"calibration={str(path)!r} has a speed of {min(rates)}; measure again with --calibrate.")
    return speed
