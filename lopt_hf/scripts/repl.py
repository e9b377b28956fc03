"""Replace layers of a pretrained causal LM by surrogates (RepL), heal it, and report what that costs and keeps.

```bash
lopt-hf repl --model HuggingFaceTB/SmolLM2-135M-Instruct --config smollm2-135m/repl/bi4
```

The report has plain removal of the same layers and the full model beside it, on the same text. Saved are the model as
it can be trained on (`unfolded`) and folded for use (`folded`), in `output_dir`. With `--judge` the three are also
asked the questions of a suite and of lm-eval's tasks, and timed.
"""

from collections.abc import Sequence
from pathlib import Path

from trl import TrlParser

from lopt_hf.bench.repl_judge import JudgeArguments, judge, load_judge_tasks
from lopt_hf.repl.comparison import Comparison
from lopt_hf.repl.comparison_arguments import (
    ComparisonArguments,
    ComparisonModelConfig,
    check_healing,
    check_output_dir,
)
from lopt_hf.repl.config import RepLConfig
from lopt_hf.repl.report import to_markdown
from lopt_hf.repl.trainer import HealingConfig
from lopt_hf.scripts.parsing import make_trl_parser, parse_or_exit
from lopt_hf.scripts.settings import UsageExit
from lopt_hf.trainers.checks import check_run_settings

__all__ = ["main", "make_parser"]


def make_parser() -> TrlParser:
    """Makes the parser of this command: script, surgery, training and model arguments, and `--config file.yaml`."""
    parts = (ComparisonArguments, RepLConfig, HealingConfig, ComparisonModelConfig, JudgeArguments)
    parser = make_trl_parser("repl", __doc__, *parts)
    parser.add_argument("--model", dest="model_name_or_path", help="Short for --model_name_or_path.")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    script_args, config, args, model_args, judge_args = parse_or_exit(make_parser(), argv)
    try:
        if model_args.model_name_or_path is None:
            raise ValueError("model_name_or_path is missing; give --model with a hub id or a local folder.")
        check_output_dir(args.output_dir)
        check_run_settings(args)
        check_healing(args)
        if judge_args.judge and script_args.scratch is not None:
            raise ValueError("judge asks what a pretrained model knows, which scratch has none of; leave one out.")
        if judge_args.judge and model_args.attn_implementation is not None:
            raise ValueError(
                f"attn_implementation={model_args.attn_implementation!r} is not what judge runs models with, which is "
                "the default; leave one out."
            )
        tasks = load_judge_tasks(judge_args) if judge_args.judge else []
        comparison = Comparison(script_args, config, args, model_args, saves_plain=judge_args.judge)
        print(comparison.describe_arithmetic(), flush=True)
        comparison.run()
        print(to_markdown(comparison.rows))
        if judge_args.judge:
            found = judge(judge_args, tasks, comparison.full_model, Path(str(args.output_dir)), comparison.dtype)
            print(f"\n{found.to_markdown()}")
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        raise UsageExit(f"lopt-hf repl: {error}") from error
    print(f"\nModel and report saved to {args.output_dir}")


if __name__ == "__main__":
    main()
