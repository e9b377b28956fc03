"""What is wrong with a data file that cannot be read: the file, the line and the cause, in one line of words."""

import ast
import codecs
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

__all__ = ["BUILDERS", "find_damage"]

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def find_damage(name: str) -> str | None:
    """Looks for damage in a file, or in the files of a folder.

    Args:
        name: The file or folder.

    Returns:
        The first damaged file with the line, the cause and the fix; `None` where there is no such file, or nothing
        wrong with it that is known here.
    """
    path = Path(name).expanduser()
    files = sorted(file for file in path.rglob("*") if file.suffix in BUILDERS) if path.is_dir() else [path]
    return next((damage for file in files if file.is_file() and (damage := _damage_of(file))), None)


def _damage_of(path: Path) -> str | None:
    if path.suffix == ".parquet":
        return _damage_of_parquet(path)
    with path.open("rb") as file:
        start = file.read(4096)
        encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)
        if encoding is not None:
            return f"{path} is written in {encoding}; save it as UTF-8."
        file.seek(0)
        if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            cause = _damage_of_document(file.read(), is_array=True)
            return cause and f"{path}, array: {cause}"
        causes = ((number, _damage_of_document(line)) for number, line in enumerate(file, start=1))
        return next((f"{path}, line {number}: {cause}" for number, cause in causes if cause), None)


def _damage_of_parquet(path: Path) -> str | None:
    try:
        for _ in pyarrow.parquet.ParquetFile(path).iter_batches():
            pass
    except (pyarrow.ArrowException, OSError) as error:
        return f"{path} is no whole Parquet file ({_first_line(error)}); write or download it again."
    return None


def _damage_of_document(raw: bytes, is_array: bool = False) -> str | None:
    if not raw.strip():
        return None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1} ({raw[error.start]:#04x}) is no UTF-8; save the file as UTF-8."
    try:
        value = json.loads(text, object_pairs_hook=_distinct_keys)
    except _DuplicateKey as error:
        return f"the key {error.key!r} is there twice; remove one of them."
    except ValueError as error:
        return _why_no_json(text, error)
    except RecursionError:
        return "lists or objects in it are nested too deeply to be read; flatten them, or write them as text."
    for row in value if is_array else [value]:
        if not isinstance(row, dict):
            return f'{_show(row)} is no row; a row is an object such as {{"question": ..., "answer": ...}}.'
        for key, lone in _lone_surrogates(row, ""):
            return f"the text of {key!r} holds half a character ({lone!a}, a lone surrogate); remove or replace it."
    return None


class _DuplicateKey(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKey(key)
        found[key] = value
    return found


def _why_no_json(text: str, error: ValueError) -> str:
    if "\0" in text:
        return "it holds zero bytes, as a file whose writing was cut off does; restore it, or remove the line."
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        if isinstance(ast.literal_eval(text.strip()), dict | list):
            return f"{_show(text.strip())} is a Python literal and no JSON; write it by json.dumps."
    where = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
    what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return f"no valid JSON ({what}{where}): {_show(text.strip())}; correct or remove it."


def _lone_surrogates(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield from ((key, letter) for letter in value if 0xD800 <= ord(letter) <= 0xDFFF)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _lone_surrogates(name, key or "a key")
            yield from _lone_surrogates(inner, key or name)
    elif isinstance(value, list):
        for inner in value:
            yield from _lone_surrogates(inner, key)


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return ascii(text if len(text) <= 60 else f"...{text[-57:]}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
