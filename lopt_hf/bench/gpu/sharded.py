"""Training runs under FSDP2 in one process, started by `accelerate launch` with a configuration file of the recipes.

`python -m lopt_hf.bench.gpu.sharded FOLDER INDEX` is what is launched.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lopt_hf.bench.gpu.training import Training
from lopt_hf.bench.gpu.updates import Comparison
from lopt_hf.bench.gpu.worker import clean
from lopt_hf.bench.gpu.workload import TrainingWorkload
from lopt_hf.common.launching import LAUNCHER, ON_THIS_HOST

__all__ = ["Sharded", "main", "read_runs", "write_runs"]

# A machine without a network has this interface alone.
_INTERFACE = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}


@dataclass(frozen=True)
class Sharded:
    """One of several runs that are launched together, ready to be called as a case's `run`.

    The first one that is called launches all that have no result yet, since each launch imports everything again.

    Attributes:
        runs: All of them.
        index: Which one this is.
        config_file: For `accelerate launch`; it says how to shard.
    """

    runs: Sequence[Training]
    index: int
    config_file: Path

    def __call__(self, folder: Path) -> dict[str, Any]:
        """Returns what the run returned.

        Raises:
            ValueError: If there is no such configuration file.
            RuntimeError: If the launched process ended before this run did.
        """
        if not _result(folder, self.index).exists():
            self._launch(folder)
        if not _result(folder, self.index).exists():
            raise RuntimeError("the launched process ended before this run had its result; the log has its words")
        values: dict[str, Any] = json.loads(_result(folder, self.index).read_text())
        return values

    def _launch(self, folder: Path) -> None:
        if not self.config_file.exists():
            raise ValueError(f"{self.config_file} is missing; run from a checkout, which has the recipes.")
        write_runs(self.runs, folder)
        launcher = [*LAUNCHER, *ON_THIS_HOST, "--config_file", str(self.config_file), "--num_processes", "1"]
        script = ["-m", "lopt_hf.bench.gpu.sharded", str(folder), str(self.index)]
        subprocess.run([*launcher, *script], env={**os.environ, **_INTERFACE}, check=False)


def write_runs(runs: Sequence[Training], folder: Path) -> None:
    """Writes runs for the process that is launched."""
    (folder / "sharded.json").write_text(json.dumps([asdict(run) for run in runs]))


def read_runs(folder: Path) -> list[Training]:
    """Reads what `write_runs` wrote."""
    return [
        Training(
            **values
            | {
                "workload": TrainingWorkload(**values["workload"]),
                "comparison": values["comparison"] and Comparison(**values["comparison"]),
            }
        )
        for values in json.loads((folder / "sharded.json").read_text())
    ]


def _result(folder: Path, index: int) -> Path:
    return folder / f"sharded-{index}.json"


def main(folder: Path, first: int) -> None:
    """Runs what was written to `folder`, from the run with index `first` on."""
    from lopt_hf.bench.training import silence

    silence()
    for index, run in enumerate(read_runs(folder)[first:], start=first):
        print(f"--- sharded run {index}", file=sys.stderr, flush=True)
        clean()
        _result(folder, index).write_text(json.dumps(run(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
