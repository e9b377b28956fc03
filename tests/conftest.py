import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; also switches TRL's telemetry off
os.environ.pop("LOPT_HF_DATA_DIR", None)  # a user's copies, which grids would read in place of the hub's

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

datasets.disable_progress_bars()
torch.set_num_threads(1)  # tiny models are slower on more

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module", autouse=True)
def imports_are_not_collected() -> None:
    """`Trainer.train` ends in a `gc.collect()`, four fifths of whose time would go to what the imports have made."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference data in {SHARED.name}/ beside the checkout")
    return SHARED
