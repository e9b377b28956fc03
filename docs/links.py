"""A hook of mkdocs: README.md is the first page, and links to files outside of `docs/` lead to the repository.

So that every page reads well both in the repository and on the site, and what stands in README stands there only.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")  # of [text](target#anchor), the target of a relative link
# In docstrings, as Hugging Face's documentation builder reads it: [`~trl.SFTTrainer`]
REFERENCE = re.compile(r"\[<code>~?([\w.]+)</code>\]")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Replaces the first page by README.md, and in all pages the targets of links that leave `docs/`."""
    source = posixpath.join("docs", page.file.src_uri)
    if page.file.src_uri == "index.md":
        source, markdown = "README.md", (ROOT / "README.md").read_text(encoding="utf-8")
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: _target(link[1], source, config["repo_url"]), text) for text in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, **_: Any) -> str:
    """Shows references to other libraries, which a docstring has in Hugging Face's form, as code."""
    return REFERENCE.sub(r"<code>\1</code>", html)


def _target(link: str, source: str, repo_url: str) -> str:
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if not (ROOT / path).exists():
        raise PluginError(f"{source}: there is no {path}, to which it links")
    if path.startswith(DOCS):
        return posixpath.relpath(path.removeprefix(DOCS), posixpath.dirname(source.removeprefix(DOCS)) or ".")
    return f"{repo_url}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
