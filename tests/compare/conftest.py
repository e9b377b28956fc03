"""Makes lm-eval quick, as in `tests/retention`."""

from tests.retention.conftest import no_environment_report, own_tasks_of_lm_eval_are_read_once

__all__ = ["no_environment_report", "own_tasks_of_lm_eval_are_read_once"]
