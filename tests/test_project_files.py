"""The files around the package: one version everywhere, pinned actions, no more permissions than needed."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import lopt_hf

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PINNED = re.compile(r"uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")


def test_one_version() -> None:
    """It stands in the package; what cannot read it from there has the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "lopt_hf/__init__.py"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == lopt_hf.__version__
    assert f"\n## {lopt_hf.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_may_do_little(path: Path) -> None:
    text = path.read_text()
    used = [line.strip().removeprefix("- ") for line in text.splitlines() if "uses:" in line]
    assert used and all(PINNED.fullmatch(line) for line in used), used
    assert "secrets." not in text
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    of_jobs = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert of_jobs == ({"publish": {"id-token": "write"}} if path.stem == "publish" else {})
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_an_action_has_one_pin() -> None:
    pins: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for action, pin in re.findall(r"uses: ([\w./-]+)@(\S+)", path.read_text()):
            pins.setdefault(action, set()).add(pin)
    assert pins and all(len(each) == 1 for each in pins.values())


def test_tests_run_on_the_versions_that_the_package_claims() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    claimed = {found[1] for each in classifiers if (found := re.fullmatch(r".*Python :: (3\.\d+)", each))}
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]
    assert set(tests["strategy"]["matrix"]["python"]) == claimed
