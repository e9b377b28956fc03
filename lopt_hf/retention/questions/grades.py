"""How hard the questions made by rule are for a model: what it answers right, by kind and difficulty.

`python -m lopt_hf.retention.questions.grades MODEL --limit 250` prints a table for each task; without `--limit` all
questions are asked. Scores and single answers are kept where `lopt-hf retention` keeps them.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence

from lopt_hf.common.tables import markdown_table
from lopt_hf.retention.evaluation import EvaluationSettings, evaluate_model
from lopt_hf.retention.questions.make import AREAS
from lopt_hf.retention.questions.question import LEVELS
from lopt_hf.retention.references import ModelReference
from lopt_hf.retention.scores import DEFAULT_CACHE, ScoreCache, TaskScores
from lopt_hf.retention.suites import SuiteTask, load_entries
from lopt_hf.retention.weights import check_files

__all__ = ["grades_table", "main"]

ALL = "all"


def grades_table(scores: TaskScores) -> str:
    """Returns the share of right answers by topic and difficulty, with the number of questions, as Markdown.

    Args:
        scores: A model's scores on a task whose documents have `topic` and `difficulty`.
    """
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for sample, right in zip(scores.samples, scores.metrics["acc,none"], strict=True):
        topic, level = sample["doc"]["topic"], str(sample["doc"]["difficulty"])
        for row in (topic, ALL):
            for column in (level, ALL):
                cells[row, column].append(float(right))
    columns = [*map(str, LEVELS), ALL]
    topics = sorted({topic for topic, _ in cells} - {ALL})
    rows = [[topic, *(_share(cells[topic, column]) for column in columns)] for topic in (*topics, ALL)]
    return markdown_table([scores.task, *columns], rows)


def _share(right: Sequence[float]) -> str:
    return f"{100 * sum(right) / len(right):.0f} % of {len(right)}" if right else ""


def main(argv: Sequence[str] | None = None) -> None:
    """Asks a model and prints the tables.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    parser = argparse.ArgumentParser(
        "python -m lopt_hf.retention.questions.grades",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--limit", type=int, help="first questions of each task, of all kinds (default: all)")
    parser.add_argument("--dtype", default="auto", help="as of lopt-hf retention")
    parser.add_argument("--batch-size", type=int, default=16, help="questions in a forward (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        _print_grades(options)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


def _print_grades(options: argparse.Namespace) -> None:
    settings = EvaluationSettings(limit=options.limit, dtype=options.dtype, batch_size=options.batch_size)
    reference = ModelReference.find(options.model)
    check_files(reference)
    entries = load_entries([SuiteTask(f"offline_{area}") for area in AREAS], shows_progress=True)
    for scores in evaluate_model(reference, entries, settings, ScoreCache(DEFAULT_CACHE)).values():
        print(f"\n{grades_table(scores)}")


if __name__ == "__main__":
    main()
