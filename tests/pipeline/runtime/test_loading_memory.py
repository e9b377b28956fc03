"""A host needs memory for its own stage only, also while it loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[3]
NUM_LAYERS = 24
ALLOWANCE = 80 * 2**20  # for what loading does beside: the threads that read, the index of the files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2.1 GB of weights in shards of 200 MB: what the imports take does not hide what loading takes."""
    folder = tmp_path_factory.mktemp("large")
    config = AutoConfig.for_model(
        "llama",
        hidden_size=1024,
        intermediate_size=5376,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=16384,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="200MB")
    return folder


def measure(checkpoint: Path, dtype: str, num_stages: int, index: int = 0) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.pipeline.runtime.loading_memory", str(checkpoint), dtype]
    command += [str(number) for number in (NUM_LAYERS, num_stages, index)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))
    values: dict[str, int] = json.loads(line.removeprefix("RESULT"))
    print(f"{dtype}, {index + 1} of {num_stages}: " + ", ".join(f"{n} {v / 2**20:.0f} MiB" for n, v in values.items()))
    return values


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_is_loaded_within_its_own_share(checkpoint, dtype):
    """In the stored data type, and in another, where every weight is read and converted."""
    whole = measure(checkpoint, dtype, 1)
    for num_stages in (2, 4):
        parts = [measure(checkpoint, dtype, num_stages, index) for index in range(num_stages)]
        assert sum(part["weights"] for part in parts) == whole["weights"]
        for part in parts:
            assert part["anonymous"] <= part["weights"] + ALLOWANCE
            assert part["resident"] < whole["resident"] * part["weights"] / whole["weights"] + ALLOWANCE
