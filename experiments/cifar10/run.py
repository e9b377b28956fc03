"""Image classifiers from random weights on CIFAR-10, by several methods and seeds: the table of README.md.

```bash
python experiments/cifar10/run.py vit resnet20 --train_file train.parquet --eval_file test.parquet --output_dir out
python experiments/cifar10/run.py vit resnet20 --claim repl --train_file ... --eval_file ... --output_dir out
```

Each run is one `lopt-hf image` in a process of its own. Stopped at any moment and run again, it goes on where it was.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from scipy import stats

from lopt_hf.common.tables import markdown_table
from lopt_hf.meters.saved_bytes import SavedBytes

BLOCKS = ["--num_blocks", "4"]
STEPS_OF_A_CYCLE = 4
METHODS = {
    "end-to-end": ["--method", "e2e"],
    "freezing": ["--method", "freeze", *BLOCKS],
    "plain local learning": ["--method", "local", *BLOCKS],
    "MLAAN": ["--method", "mlaan", "--window", "2", *BLOCKS],
    "reach [1,1,1,4]": ["--method", "reach", "--task_reach", "[1,1,1,4]", *BLOCKS],
    "reach 4": ["--method", "reach", "--task_reach", "4", *BLOCKS],
    "readout": ["--method", "readout", *BLOCKS],
    "RepL, every second layer": ["--method", "repl", "--replace_every", "2"],
    "plain removal of them": ["--method", "repl", "--operator", "removal", "--replace_every", "2"],
}
# Which part of MLAAN does it: each without one, or in the form of the paper's code
ABLATION = {
    "MLAAN without leaps": [*METHODS["MLAAN"], "--leap_layers", "[0,0,0]"],
    "MLAAN without windows": [*METHODS["MLAAN"], "--window", "1"],
    "MLAAN, sum of copy and average": [*METHODS["MLAAN"], "--combine", "sum"],
    "MLAAN, average of 10 steps": [*METHODS["MLAAN"], "--ema_decay", "0.9"],  # of 200 by default
}
# Less in the blocks whose feature maps are the largest
CUT = {
    f"{name}, cut at 1, 2, 4": [*METHODS[name], "--split_at", "1", "2", "4"]
    for name in ("plain local learning", "MLAAN", "reach [1,1,1,4]", "reach 4")
}
CUT["MLAAN without windows, cut at 1, 2, 4"] = [*ABLATION["MLAAN without windows"], "--split_at", "1", "2", "4"]
# A paper's claim: the methods that it is about, each beside its controls
CLAIMS = {
    "all": list(METHODS),
    "mlaan": ["end-to-end", "plain local learning", "MLAAN"],
    "ablation": ["end-to-end", "plain local learning", "MLAAN", *ABLATION],
    "repl": ["end-to-end", "RepL, every second layer", "plain removal of them"],
    "cut": ["end-to-end", *CUT],
}
# What a method has to be better than by its paper's claim
CONTROLS = {
    **dict.fromkeys(["MLAAN", *ABLATION], "plain local learning"),
    **dict.fromkeys([name for name in CUT if "MLAAN" in name], "plain local learning, cut at 1, 2, 4"),
    "RepL, every second layer": "plain removal of them",
}
NOT_FOR_RESNET = ("readout",)  # its layers differ in width
COMMON = {
    "vit": ["--architecture", "vit", "--learning_rate", "1e-3", "--weight_decay", "0.05"],
    "resnet20": ["--architecture", "resnet20", "--learning_rate", "3e-3", "--weight_decay", "0.05"],
}
TRAINING = [
    *("--per_device_train_batch_size", "64", "--per_device_eval_batch_size", "250", "--lr_scheduler_type", "cosine"),
    *("--warmup_steps", "0.1", "--report_to", "none", "--logging_steps", "50", "--disable_tqdm", "true"),
    *("--save_strategy", "epoch", "--save_total_limit", "1", "--dataloader_pin_memory", "false"),
]


def methods_of(architecture: str, claim: str = "all") -> dict[str, list[str]]:
    """The options of the methods that an architecture is trained by for a claim, by their names."""
    left_out = NOT_FOR_RESNET if architecture == "resnet20" else ()
    return {name: (METHODS | ABLATION | CUT)[name] for name in CLAIMS[claim] if name not in left_out}


def arguments_of(options: argparse.Namespace, method: list[str], seed: int, folder: Path) -> list[str]:
    """The arguments of one `lopt-hf image`."""
    data = ["--train_file", str(options.train_file), "--eval_file", str(options.eval_file)]
    length = ["--num_train_epochs", str(options.epochs), "--seed", str(seed), "--output_dir", str(folder)]
    return [*method, *COMMON[options.architecture], *TRAINING, *data, *length]


def result_of(folder: Path) -> float | None:
    """The accuracy of a run that has ended."""
    state = folder / "trainer_state.json"
    if not state.is_file():
        return None
    logs = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    return next((log["eval_accuracy"] for log in reversed(logs) if "eval_accuracy" in log), None)


def train(options: argparse.Namespace, name: str, method: list[str], seed: int) -> None:
    """Trains one model, unless it is there; from its last checkpoint, if it has been stopped."""
    folder = folder_of(options, name, seed)
    arguments = arguments_of(options, method, seed, folder)
    check_arguments(Path(f"{folder}.json"), arguments)
    if result_of(folder) is not None:
        return
    resume = ["--resume_from_checkpoint", "true"] if any(folder.glob("checkpoint-*")) else []
    print(f"{name}, seed {seed}", flush=True)
    command = [sys.executable, "-m", "lopt_hf.cli", "image", *arguments, *resume]
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def check_arguments(file: Path, arguments: list[str]) -> None:
    """Keeps the arguments of a run beside it, and exits if it was begun with others."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(arguments), encoding="utf-8")
    begun = json.loads(file.read_text(encoding="utf-8"))
    if begun != arguments:
        print(f"{file} is of other arguments: {' '.join(begun)}; choose another --output_dir.", file=sys.stderr)
        raise SystemExit(2)


def folder_of(options: argparse.Namespace, name: str, seed: int) -> Path:
    """Where a run writes."""
    label = "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
    return Path(options.output_dir) / options.architecture / f"{label}-seed{seed}"


def saved_bytes(options: argparse.Namespace, method: list[str]) -> int:
    """The most bytes that autograd keeps in a training step of 64 images, of as many steps as a cycle has."""
    from lopt_hf.scripts import image

    name = method[method.index("--method") + 1]
    folder = Path(options.output_dir) / "bytes"
    arguments = [*arguments_of(options, method, 0, folder), "--dataset_max_samples", "64", "--max_steps", "1"]
    trainer = image.make_trainer(*image.make_parser(name).parse_args_and_config(arguments))
    trainer.create_optimizer()
    images = trainer.train_dataset
    rows = [images[index % len(images)] for index in range(64)]
    trainer.current_gradient_accumulation_steps = 1
    with SavedBytes(trainer.model) as saved:
        for step in range(STEPS_OF_A_CYCLE):
            trainer.state.global_step = step
            trainer.training_step(trainer.model, trainer.data_collator(rows))
    return saved.peak


def report(options: argparse.Namespace) -> str:
    """The table of what is there so far."""
    methods = methods_of(options.architecture, options.claim)
    results = {
        name: {
            seed: result for seed in options.seeds if (result := result_of(folder_of(options, name, seed))) is not None
        }
        for name in methods
    }
    whole = saved_bytes(options, methods["end-to-end"])
    rows = []
    for name, found in results.items():
        share = saved_bytes(options, methods[name]) / whole
        above = [
            interval(differences(found, results[other]), "+") if other in results and other != name else ""
            for other in ("end-to-end", CONTROLS.get(name))
        ]
        rows.append([name, str(len(found)), interval(list(found.values())), *above, f"{share:.2f}"])
    head = ["method", "seeds", "accuracy, %", "above end-to-end, points", "above its control, points", "saved bytes"]
    return markdown_table(head, rows)


def differences(found: dict[int, float], others: dict[int, float]) -> list[float]:
    """Of each seed that both methods have: how far the first is above the second."""
    return [accuracy - others[seed] for seed, accuracy in found.items() if seed in others]


def interval(found: list[float], sign: str = "") -> str:
    """Mean in per cent, with the 95 % interval of Student's t over the seeds, if there are several."""
    values = [100 * accuracy for accuracy in found]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{sign}.1f}"
    if len(values) == 1:
        return mean
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {half:.1f}"


def main() -> None:
    """Trains what is not there yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "architectures", nargs="+", choices=list(COMMON), metavar="architecture", help=", ".join(COMMON)
    )
    parser.add_argument("--claim", choices=list(CLAIMS), default="all", help="the methods of one paper's claim only")
    parser.add_argument("--train_file", type=Path, required=True)
    parser.add_argument("--eval_file", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="print the table of what is there; train nothing")
    options = parser.parse_args()
    tables = [argparse.Namespace(**vars(options), architecture=name) for name in options.architectures]
    for seed in () if options.report else options.seeds:  # so that what is there at any time is comparable
        for table in tables:
            for name, method in methods_of(table.architecture, table.claim).items():
                train(table, name, method, seed)
    for table in tables:
        print(f"{table.architecture}:\n\n{report(table)}\n")


if __name__ == "__main__":
    main()
