"""A model's single answers, kept while it is measured, so that a killed run goes on in the middle of a task.

lm-eval keeps them as pickles, which run whatever code somebody has put into them. Here they are JSON, so that their
folder may be shared.
"""

import json
import sqlite3
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM, CachingLM
from sqlitedict import SqliteDict

__all__ = ["KeptAnswers"]


class KeptAnswers(CachingLM):
    """lm-eval's model that looks first whether it has answered before.

    Args:
        language_model: The model.
        beginning: Beginning of the path of its file; the folder is made.
        rank: Of this process, which has a file of its own.
    """

    def __init__(self, language_model: LM, beginning: Path, rank: int) -> None:
        # Not the parent's, which opens a file of pickles
        path = beginning.with_name(f"{beginning.name}_rank{rank}.json.db")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lm, self.cache_db = language_model, str(path)
        self.dbdict = SqliteDict(str(path), autocommit=True, encode=json.dumps, decode=_decode)
        language_model.set_cache_hook(self.get_cache_hook())


def _decode(text: str | bytes) -> Any:
    try:
        answer = json.loads(text)
    except ValueError as error:
        raise sqlite3.DataError("an answer in it is no JSON") from error
    return tuple(answer) if isinstance(answer, list) else answer
