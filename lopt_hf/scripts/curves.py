"""Draw what training runs logged, as curves in one plot: runs of one label as their mean, with each run behind it.

```bash
lopt-hf curves --run LoPT=out/lopt_k2 --run end-to-end=out/e2e --metric reward --output reward.png
lopt-hf curves --run LoPT=out/a --run LoPT=out/b --metric eval_rewards/accuracies --smooth 5 --output accuracy.png
```

It also prints, for each label, the metric's mean over the first and the last part of the runs. Needs the extra `demo`,
which brings matplotlib.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lopt_hf.common.figures import check_figure_path, save_figure
from lopt_hf.common.settings import check_at_least
from lopt_hf.compare.curves import Curve, plot_curves, read_curve, to_markdown
from lopt_hf.scripts.settings import OneLineParser, check_output_files

__all__ = ["main", "make_parser"]


def make_parser() -> OneLineParser:
    """Makes the parser of this command."""
    parser = OneLineParser("curves", __doc__)
    parser.add_argument(
        "--run",
        dest="runs",
        action="append",
        required=True,
        metavar="LABEL=OUTPUT_DIR",
        help="A run's folder; repeat it for more runs, with the same label for the seeds of one method.",
    )
    parser.add_argument("--metric", required=True, help="What to draw, as it is called in the log, such as reward.")
    parser.add_argument("--output", type=Path, required=True, help="The file to write: .png, .svg or .pdf.")
    parser.add_argument("--smooth", type=int, default=1, help="Average over this many logged values. Default: none.")
    parser.add_argument(
        "--part",
        type=int,
        default=10,
        help="How many of a run's first and last values the printed means are over; half of a run at most.",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the curves and prints the means.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    make_parser().run(_run, argv)


def _run(options: argparse.Namespace) -> None:
    groups: dict[str, list[Curve]] = {}
    check_figure_path("--output", options.output)
    check_output_files(options, ["output"])
    for name in ("smooth", "part"):
        check_at_least(f"--{name}", getattr(options, name), 1)
    for run in options.runs:
        label, separator, folder = run.partition("=")
        if not (label and separator):
            raise ValueError(f"--run {run} must be LABEL=OUTPUT_DIR.")
        groups.setdefault(label, []).append(read_curve(folder, options.metric))
    save_figure(plot_curves(groups, options.metric, options.smooth), options.output)
    print(to_markdown(groups, options.metric, options.part))
    print(f"Curves drawn to {options.output}")


if __name__ == "__main__":
    main()
