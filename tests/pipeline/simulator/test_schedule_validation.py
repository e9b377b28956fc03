"""The simulation against real runs of torch's schedules and of the pipeline's channels, with sleeping stages."""

import pytest

from lopt_hf.pipeline.simulator.schedule import SCHEDULES, StageTimes, Workload, simulate
from lopt_hf.pipeline.simulator.schedule_validation import ScheduleRunError, measure_schedules

TOLERANCE = 0.15


@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_real_runs_take_as_long_as_simulated(stages):
    """Equal and uneven stages; a gradient per micro-batch and local objectives included."""
    uneven = StageTimes(
        forward=(0.05, 0.03, 0.06, 0.04)[:stages],
        backward=(0.07, 0.1, 0.08, 0.12)[:stages],
        local=(0.02, 0.03, 0.01, 0.0)[:stages],
        optimizer=(0.05, 0.03, 0.02, 0.06)[:stages],
    )
    workloads = [Workload(StageTimes.equal(stages, 0.04, 0.08), 2 * stages), Workload(uneven, 4 * stages)]
    cases = [(schedule, workload) for workload in workloads for schedule in SCHEDULES]
    for (schedule, workload), seconds in zip(cases, measure_schedules(cases), strict=True):
        simulated = simulate(schedule, workload).step_seconds
        assert seconds == pytest.approx(simulated, rel=TOLERANCE), (schedule, workload)


def test_a_process_that_fails_ends_the_run_with_its_reason():
    """torch refuses fewer micro-batches than stages, which `check_measurable` would have found."""
    with pytest.raises(ScheduleRunError, match="a stage's process failed: ValueError: Number of microbatches"):
        measure_schedules([("1f1b", Workload(StageTimes.equal(2, 0.01, 0.01), 1))])
