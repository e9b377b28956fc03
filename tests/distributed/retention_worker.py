"""One rank of `lopt-hf retention`, which also notes what it was asked; launched by `test_retention.py`."""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

import tests.conftest  # noqa: F401  (offline, one thread)
from lopt_hf.retention.report import report

METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


def main() -> None:
    notes, *sys.argv[1:] = sys.argv[1:]
    asked: dict[str, list[Any]] = {method: [] for method in (*METHODS, "write_report")}

    def noting(method: str, original: Any) -> Any:
        def noted(language_model: HFLM, requests: list[Any], disable_tqdm: bool = False) -> Any:
            asked[method].append([Path(language_model.pretrained).name, [str(request.args) for request in requests]])
            return original(language_model, requests, disable_tqdm)

        return noted

    for method in METHODS:
        setattr(HFLM, method, noting(method, getattr(HFLM, method)))
    write_report = report.write_report
    report.write_report = lambda *arguments: asked["write_report"].append(1) or write_report(*arguments)
    try:
        runpy.run_module("lopt_hf.scripts.retention", run_name="__main__")
    finally:
        Path(notes, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(asked))


if __name__ == "__main__":
    main()
