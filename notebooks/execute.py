"""Run the notebooks from top to bottom, each in a new kernel and an empty folder.

```bash
python notebooks/execute.py                                # all of them, as CI does; no file is changed
python notebooks/execute.py --write notebooks/6_plan.ipynb # one of them, and keep what it shows
```

What a notebook writes to stderr (progress bars, warnings) and bars that notebooks draw are not kept.
"""

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> NotebookNode:
    """Runs a notebook; raises if a cell does."""
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="which; default: all in this file's folder")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the files")
    options = parser.parse_args()
    started = time.monotonic()
    for path in options.notebooks or sorted(Path(__file__).parent.glob("*.ipynb")):
        began = time.monotonic()
        try:
            notebook = execute(path)
        except (CellExecutionError, DeadKernelError) as error:
            sys.exit(f"{path.name} failed after {time.monotonic() - began:.0f} s:\n{error}")
        print(f"{path.name}: {time.monotonic() - began:.0f} s", flush=True)
        if options.write:
            nbformat.write(clean(notebook), path)
    print(f"in all: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
