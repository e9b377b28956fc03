"""The choice between float32 and bfloat16: by measuring where nobody says which, as asked for otherwise."""

import logging
import os
import platform
import subprocess
import sys

import pytest
import torch
from trl import SFTConfig

from lopt_hf.common import arithmetic
from lopt_hf.common.arithmetic import choose_arithmetic, measure_arithmetic, pick_bf16, read_dtype
from lopt_hf.trainers.configs import LoPTConfig, convert_config

# The instructions of a CPU without AVX-512: bfloat16 is emulated there
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing is kept from another test, or for it, and nothing is told by a launcher."""
    for function in (arithmetic._measure_cpu, arithmetic._warn_of_slow_bfloat16):
        function.cache_clear()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    yield
    arithmetic._measure_cpu.cache_clear()
    arithmetic._warn_of_slow_bfloat16.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """Makes a machine of a given speed: seconds of a product in float32 and in bfloat16."""

    def make(float32: float, bfloat16: float) -> None:
        seconds = {"float32": float32, "bfloat16": bfloat16}
        monkeypatch.setattr(arithmetic, "_seconds_per_product", lambda: seconds)

    return make


@pytest.mark.parametrize(
    ("float32", "bfloat16", "expected"),
    [
        pytest.param(2e-3, 1e-3, "bfloat16", id="instructions for bfloat16"),
        pytest.param(1e-3, 3e-2, "float32", id="bfloat16 emulated"),
        pytest.param(1e-3, 1e-3, "float32", id="no difference: the exacter one"),
    ],
)
def test_auto_is_the_faster_type(machine, float32, bfloat16, expected):
    machine(float32, bfloat16)
    chosen = choose_arithmetic("auto")
    assert (chosen.dtype, chosen.torch_dtype, chosen.device) == (expected, getattr(torch, expected), "cpu")
    assert chosen.gflops["float32"] * float32 == pytest.approx(chosen.gflops["bfloat16"] * bfloat16)
    assert "\n" not in str(chosen) and all(part in str(chosen) for part in (expected, "GFLOP/s in bfloat16"))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the variables are of x86 instructions")
def test_emulated_bfloat16_is_not_chosen():
    """What the measuring itself finds, on a machine that is told to do without AVX-512."""
    script = "from lopt_hf.common.arithmetic import measure_arithmetic; print(measure_arithmetic('cpu').dtype)"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=os.environ | AVX2, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "float32"


def test_a_slow_first_product_decides_nothing(monkeypatch):
    """A library is loaded then; a cold machine was told that float32 is the slower by it."""
    clock = iter([0.0, 1.0, *(1.0 + 0.001 * i for i in range(100))])
    monkeypatch.setattr(arithmetic, "perf_counter", lambda: next(clock))
    assert arithmetic._shortest(torch.float32) == pytest.approx(0.001)


def test_measuring_leaves_everything_as_it_was():
    torch.manual_seed(0)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first = measure_arithmetic()
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert measure_arithmetic() is first, "measured twice in a process"


@pytest.mark.parametrize(
    ("text", "name"), [("auto", "auto"), ("fp32", "float32"), ("bf16", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_old_spellings_are_kept(text, name):
    assert read_dtype(text) == name


def test_unknown_type_is_refused():
    with pytest.raises(ValueError, match="dtype='int8' is unknown; use auto, float32 or bfloat16"):
        choose_arithmetic("int8")


def test_slow_bfloat16_is_obeyed_with_one_warning(machine, caplog):
    machine(1e-3, 3e-2)
    assert [choose_arithmetic("bf16").dtype, choose_arithmetic("bfloat16").dtype] == ["bfloat16"] * 2
    warning = caplog.text
    assert len(caplog.records) == 1 and "1.12 GFLOP/s" in warning and "33.6 in float32" in warning


def test_float32_is_obeyed_without_a_word(machine, caplog):
    machine(2e-3, 1e-3)
    assert choose_arithmetic("float32").dtype == "float32"
    assert not caplog.records


@pytest.mark.parametrize("has_it", [True, False])
def test_accelerator_is_not_timed(monkeypatch, has_it):
    """It is asked, since bfloat16 also halves the memory there."""
    arithmetic._ask_accelerator.cache_clear()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    chosen = choose_arithmetic("auto")
    assert (chosen.dtype, chosen.device) == ("bfloat16" if has_it else "float32", "cuda")
    assert not chosen.gflops
    arithmetic._ask_accelerator.cache_clear()


@pytest.mark.parametrize("is_faster", [True, False])
@pytest.mark.parametrize(
    ("given", "launched_as", "expected"),
    [
        pytest.param({}, None, None, id="unset"),
        pytest.param({}, "no", None, id="launched without the option"),
        pytest.param({"bf16": True}, None, "bf16", id="bf16"),
        pytest.param({"bf16": False}, None, "no", id="no bf16"),
        pytest.param({"fp16": True}, None, "fp16", id="fp16"),
        pytest.param({}, "bf16", "bf16", id="launched with bf16"),
        pytest.param({}, "fp16", "fp16", id="launched with fp16"),
    ],
)
def test_config_takes_the_faster_type_unless_told(
    machine, monkeypatch, tmp_path, caplog, given, launched_as, expected, is_faster
):
    machine(2e-3, 1e-3 if is_faster else 3e-2)
    if launched_as is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched_as)
    args = LoPTConfig(output_dir=str(tmp_path), **given)
    assert args.mixed_precision == (expected or ("bf16" if is_faster else "no"))
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (expected == "bf16" and not is_faster)
    peer = convert_config(args, SFTConfig)
    assert (peer.bf16, peer.mixed_precision) == (args.bf16, args.mixed_precision), "the stock trainer computes alike"


def test_fp16_leaves_bf16_off(machine):
    machine(2e-3, 1e-3)
    assert pick_bf16(None, fp16=True) is False
