"""One rank of a two-process run with a RepL model: launched by `test_repl.py` with `accelerate launch`."""

import gc
import sys
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import save_file
from trl import SFTTrainer

import tests.conftest  # noqa: F401  (offline, one thread)
from lopt_hf import LoPTTrainer
from tests.repl.helpers import make_repl
from tests.repl.test_training import make_trainer, snapshot


def run(output_dir: Path, kind: str, **settings: object) -> dict:
    model = make_repl(operator="branches")
    trainer = make_trainer({"sft": SFTTrainer, "lopt": LoPTTrainer}[kind], output_dir, model, **settings)
    trainer.train()
    return snapshot(model)


def main() -> None:
    output_dir, kind = Path(sys.argv[1]), sys.argv[2]
    weights = run(output_dir, kind, per_device_train_batch_size=2)
    state = PartialState()
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        output_dir / f"weights-{state.process_index}.safetensors",
    )
    gc.collect()  # DDP's reducer goes before the group, see `end_training`
    state.destroy_process_group()


if __name__ == "__main__":
    main()
