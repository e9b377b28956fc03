"""Data sets brought to prompts keep what rewards read."""

import pytest
from datasets import Dataset

from lopt_hf.data.questions import to_questions

USER = [{"role": "user", "content": "1 + 1?"}]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ({"question": "1 + 1?", "answer": "#### 2"}, {"answer": "#### 2"}),  # GSM8K
        (
            {"source": "x", "problem": "1 + 1?", "solution": r"\boxed{2}", "messages": USER},  # NuminaMath
            {"source": "x", "solution": r"\boxed{2}"},
        ),
        ({"query": "1 + 1?", "answer": "2"}, {"answer": "2"}),
    ],
)
def test_questions_become_prompts(row, kept):
    assert to_questions(Dataset.from_list([row])).to_list() == [{**kept, "prompt": USER}]
    assert to_questions(Dataset.from_list([row]), "Be brief.").to_list() == [{**kept, "prompt": [SYSTEM, *USER]}]


def test_a_prompt_stays_what_it_is():
    for prompt in ("1 + 1?", USER):
        dataset = Dataset.from_list([{"prompt": prompt, "answer": "2"}])
        assert to_questions(dataset) is dataset
        assert to_questions(dataset, "Be brief.")[0]["prompt"] == [SYSTEM, *USER]


def test_a_system_message_of_the_datas_own_stays():
    own = [{"role": "system", "content": "Think."}, *USER]
    assert to_questions(Dataset.from_list([{"prompt": own}]), "Be brief.")[0]["prompt"] == own


def test_streams():
    rows = Dataset.from_list([{"question": "1 + 1?", "answer": "2"}]).to_iterable_dataset()
    assert list(to_questions(rows)) == [{"prompt": USER, "answer": "2"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "empty"), ([{"text": "a"}], r"columns \['text'\] have no question; rename one to prompt")],
)
def test_data_without_questions(rows, message):
    with pytest.raises(ValueError, match=message):
        to_questions(Dataset.from_list(rows))


def test_context_beside_a_prompt_is_named(caplog):
    to_questions(Dataset.from_list([{"prompt": "1 + 1?", "answer": "2", "choices": ["1", "2"], "images": []}]))
    assert caplog.messages == ["The data's prompt is trained on, not its choices."]
