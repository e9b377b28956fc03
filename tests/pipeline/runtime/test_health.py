"""What is said of the error by which a stage ends."""

import pytest
import torch.distributed as dist

from lopt_hf.pipeline.runtime.health import PeerMonitor


@pytest.mark.parametrize(
    ("error", "said", "traced"),
    [
        (KeyError("input_ids"), "'input_ids' (KeyError)", True),
        (AssertionError(), "AssertionError", True),
        (RuntimeError("shapes differ"), "shapes differ (RuntimeError)", True),
        (ValueError("num_blocks=0 is too small."), "num_blocks=0 is too small.", False),
        (FileNotFoundError(2, "No such file", "rows.json"), "[Errno 2] No such file: 'rows.json'", False),
        (ImportError("torchvision is missing."), "torchvision is missing.", False),
        (FloatingPointError("loss is nan at step 2."), "loss is nan at step 2.", False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_that_nobody_expected_is_named_by_its_type_and_traced(error, said, traced, capsys):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monitor = PeerMonitor(store, 0, {}, timeout=20)
    try:
        raise error
    except Exception as raised:
        explained = monitor.explain(raised, "rank 0 (stage 0)")
    monitor.finish()
    assert str(explained) == f"rank 0 (stage 0) failed: {said}"
    printed = capsys.readouterr().err
    assert f"rank 0 stops: {explained}" in printed
    assert ("Traceback (most recent call last)" in printed and __file__ in printed) == traced
