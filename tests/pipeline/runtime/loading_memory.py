"""Loads a stage, or the whole model, in a process of its own and prints what memory that took; see the test beside it.

Bytes above what the process had before: resident at the peak (with the pages of files that are mapped), anonymous at
the peak (without them), and the weights themselves. Weights of the stored data type are only mapped when they are
loaded, so each is also written to, as training does.
"""

import json
import sys
import threading
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import tests.conftest  # noqa: F401  (offline, one thread)
from lopt_hf.local.blocks import split_layers
from lopt_hf.pipeline.runtime.stage import load_stage
from lopt_hf.pipeline.runtime.stage_plan import plan_stages


def status(name: str) -> int:
    """A line of `/proc/self/status` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class AnonymousPeak:
    """Looks at the anonymous memory again and again; the system keeps no peak of it."""

    def __init__(self) -> None:
        self.peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.002):
            self.peak = max(self.peak, status("RssAnon"))

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return max(self.peak, status("RssAnon"))


def main() -> None:
    checkpoint, dtype, num_layers, num_stages, index = *sys.argv[1:3], *map(int, sys.argv[3:])
    torch.zeros(1) + 1  # what the first operation allocates
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS"), status("RssAnon")
    watch = AnonymousPeak()
    if num_stages == 1:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    else:
        plan = plan_stages(split_layers(num_layers, num_stages), num_stages)[index]
        model = load_stage(checkpoint, plan, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1)
    anonymous = watch.stop()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    result = {"resident": status("VmHWM") - before[0], "anonymous": anonymous - before[1], "weights": weights}
    print("RESULT" + json.dumps(result))


if __name__ == "__main__":
    main()
