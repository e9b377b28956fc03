"""The pages: every link leads somewhere, every page is in the contents, and README stays short."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.docs.markdown import DOCS, PAGES, ROOT, anchors, blocks, links, read

FOLDERS = ("docs", "notebooks", "recipes", "experiments", ".github")
MARKDOWN = sorted(ROOT.glob("*.md")) + sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))
SITE = yaml.safe_load(read(ROOT / "mkdocs.yml"))


def targets(nav) -> list[str]:
    """The files of a table of contents, however deep."""
    if isinstance(nav, str):
        return [nav]
    return [name for part in (nav.values() if isinstance(nav, dict) else nav) for name in targets(part)]


def broken(path: Path, text: str) -> list[str]:
    """The links of a file that lead to no file of the repository, or to no heading of it."""
    wrong = []
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or ROOT not in (target, *target.parents):
            wrong.append(link)
        elif anchor and anchor not in anchors(text if target == path else read(target)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert broken(path, read(path)) == []


def test_a_broken_link_is_found():
    text = "# One title\n\n[a](#one-title) [b](nowhere.md) [c](#nothing) [d](docs/choose.md#nothing)\n"
    assert broken(ROOT / "README.md", f"{text}```\n[e](x.md)\n```\n") == [
        "nowhere.md",
        "#nothing",
        "docs/choose.md#nothing",
    ]


def test_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= 150


def test_readme_has_the_commands_that_ci_runs():
    lines = [line for block in blocks(read(ROOT / "README.md"), "bash") for line in block.splitlines()]
    for marker, command in (("# the main job", "lopt-hf demo"), ("# the tests", "pytest")):
        (line,) = (line for line in lines if marker in line)
        assert re.fullmatch(r"pip install .* && " + command, line.partition("#")[0].strip())


def test_contents_and_llms_name_every_page():
    assert sorted(targets(SITE["nav"])) == [path.name for path in PAGES]
    listed = re.findall(r"/blob/main/docs/([\w-]+\.md)\)", read(DOCS / "llms.txt"))
    assert sorted([*listed, "index.md"]) == [path.name for path in PAGES]


def test_one_address_of_the_repository():
    address = SITE["repo_url"]
    assert f"git clone {address} && cd lopt_hf" in read(ROOT / "README.md")
    assert set(re.findall(r"https://github\.com/[\w-]+/lopt_hf", read(DOCS / "llms.txt"))) == {address}
    urls = tomllib.loads(read(ROOT / "pyproject.toml"))["project"].get("urls", {})
    assert {url for url in urls.values() if "github.com" in url and not url.startswith(address)} == set()
