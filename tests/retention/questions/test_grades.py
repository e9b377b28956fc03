"""The table of right answers by kind and difficulty."""

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
