"""Run the notebooks from top to bottom, each in a new kernel and an empty folder.

```bash
python notebooks/execute.py                                # all of them, one after the other; no file is changed
python notebooks/execute.py --jobs 2                       # two at a time, as CI does, with a share of the cores each
python notebooks/execute.py --write notebooks/6_plan.ipynb # one of them, and keep what it shows
```

What a notebook writes to stderr (progress bars, warnings) and bars that notebooks draw are not kept.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from traitlets.config import Config

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> NotebookNode:
    """Runs a notebook; raises if a cell does."""
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder, TemporaryDirectory() as sockets:
        # Two notebooks that start at a time may pick the same free TCP port; sockets in own folders never meet.
        transport = {"transport": "ipc", "connection_file": f"{sockets}/kernel.json"}
        NotebookClient(
            notebook,
            config=Config({} if sys.platform == "win32" else {"KernelManager": transport}),
            timeout=None,  # a slow machine is no failure
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            extra_arguments=["--log-level=ERROR"],  # of the kernel itself
        ).execute()
    return notebook


def is_kept(output: NotebookNode) -> bool:
    """Whether an output is no progress bar and no warning."""
    if output.output_type == "stream":
        return bool(output.name == "stdout" and output.text.strip())
    return "<progress" not in output.get("data", {}).get("text/html", "")


def clean(notebook: NotebookNode) -> NotebookNode:
    """Leaves what a reader wants: what was shown, and nothing of when and where it ran."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_kept(output)]
    return notebook


def run(path: Path, write: bool) -> str:
    """Runs a notebook and keeps its outputs if asked to; returns what there is to say, and raises if a cell fails."""
    began = time.monotonic()
    try:
        notebook = execute(path)
    except (CellExecutionError, DeadKernelError) as error:
        raise RuntimeError(f"{path.name} failed after {time.monotonic() - began:.0f} s:\n{error}") from None
    if write:
        nbformat.write(clean(notebook), path)
    return f"{path.name}: {time.monotonic() - began:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="which; default: all in this file's folder")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the files")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (default: %(default)s)")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs} runs nothing; give at least 1.")
    if options.write and options.jobs > 1:
        parser.error("--write keeps measured figures, which others beside them would change; leave --jobs out.")
    started = time.monotonic()
    if options.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.jobs))
    paths = options.notebooks or sorted(Path(__file__).parent.glob("*.ipynb"))
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        futures = [pool.submit(run, path, options.write) for path in paths]
        for future in as_completed(futures):
            if (error := future.exception()) is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                sys.exit(str(error))
            print(future.result(), flush=True)
    print(f"in all: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
