"""What samples can show does not depend on the change asked for, and few samples are not taken for enough."""

import math

import pytest

from lopt_hf.retention.power import detectable_changes, detection_table
from lopt_hf.retention.scores import TaskScores
from lopt_hf.retention.suites import TaskEntry
from tests.compare.test_contrasts import StubTask

ENTRY = TaskEntry("kept", (StubTask(),))  # type: ignore[arg-type]


def scores(values: list[float], higher_is_better: bool = True) -> dict[str, TaskScores]:
    samples = [{"doc_id": i} for i in range(len(values))]
    named, direction = {"score,none": values}, {"score,none": higher_is_better}
    return {"kept": TaskScores("kept", "1", 0, named, {}, direction, samples)}


def test_the_smallest_change_is_the_samples_own() -> None:
    found = [detectable_changes([ENTRY], scores([0.0, 1.0] * 100), points, 0.5)[0] for points in (0.1, 1.0, 100.0)]
    assert len({change.detectable for change in found}) == 1
    assert found[0].detectable == pytest.approx(2.8016 * math.sqrt(0.25 / 200), rel=0.05)
    assert [change.needed for change in found[:2]] == pytest.approx([1_962_000, 19_620], rel=0.1)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_none_right_is_not_known_for_good(value: float) -> None:
    """Of 50 questions none right: as if one of 52 were, and not no variance at all."""
    (change,) = detectable_changes([ENTRY], scores([value] * 50), 1.0, 0.5)
    share = 1 / 52
    assert change.needed == pytest.approx(2.8016**2 * share * (1 - share) / 0.01**2, rel=0.01)
    assert "| no |" in detection_table([change])


@pytest.mark.parametrize("values", [[0.5], [math.inf, 3.0]])
def test_one_sample_or_an_infinite_metric_tells_nothing(values: list[float]) -> None:
    (change,) = detectable_changes([ENTRY], scores(values, higher_is_better=False), 1.0, 0.5)
    assert change.needed is None
    assert detection_table([change]).splitlines()[-1].endswith("| - | cannot tell | - |")
