"""The table of right answers by kind and difficulty."""

import pytest

from lopt_hf.retention.questions import grades
from lopt_hf.retention.questions.grades import grades_table
from lopt_hf.retention.scores import TaskScores


def test_shares_by_topic_and_difficulty() -> None:
    labels = [("sums", 1), ("sums", 1), ("sums", 5), ("names", 1)]
    scores = TaskScores(
        task="offline_own",
        version="2.0",
        num_fewshot=0,
        metrics={"acc,none": [1.0, 0.0, 1.0, 0.0]},
        values={"acc,none": 0.5},
        higher_is_better={"acc,none": True},
        samples=[{"doc": {"topic": topic, "difficulty": level}} for topic, level in labels],
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in grades_table(scores).splitlines()]
    assert rows[0] == ["offline_own", "1", "2", "3", "4", "5", "all"]
    assert rows[2:] == [
        ["names", "0 % of 1", "", "", "", "", "0 % of 1"],
        ["sums", "50 % of 2", "", "", "", "100 % of 1", "67 % of 3"],
        ["all", "33 % of 3", "", "", "", "100 % of 1", "50 % of 4"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/model"], "model '/nowhere/model' is no folder here"),
        (["/nowhere/model", "--limit", "0"], "limit=0 leaves nothing to measure"),
        (["/nowhere/model", "--dtype", "fp8"], "dtype='fp8' is unknown"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        grades.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"python -m lopt_hf.retention.questions.grades: error: {message}")
