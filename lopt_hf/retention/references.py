"""Locations of models: full checkpoints or PEFT adapters, local or on the hub, with their tokenizers."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from lopt_hf.data.pretrained import resolve_model
from lopt_hf.retention.records import read_record

__all__ = ["ModelReference", "fingerprint", "load_tokenizer"]

HUB_ID_AT_REVISION = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)@(?P<revision>.+)")
# What decides a model's answers; what training leaves beside it (optimizer, heads, logs) does not
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".model", ".txt", ".jinja")
CONFIG_FILES = frozenset(
    {
        "adapter_config.json",
        "added_tokens.json",
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
)
NOT_WEIGHTS = frozenset({"local_heads.safetensors", "training_args.bin", "optimizer.bin"})


@dataclass(frozen=True)
class ModelReference:
    """A model on disk or on the hub: a full checkpoint or a PEFT adapter.

    Parameters:
        name: As the user gave it.
        base: Hub id or folder of the full model.
        revision: Branch, tag or commit of the full model on the hub.
        adapter: Folder or hub id of the adapter, if it is one.
        adapter_revision: Branch, tag or commit of the adapter on the hub.
    """

    name: str
    base: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    @classmethod
    def find(cls, name: str, adapter_base: str | None = None) -> "ModelReference":
        """Tells a full model from an adapter.

        Args:
            name: A folder, or a hub id, whose revision may follow an `@`. An adapter's base is the one that its
                configuration names, at the revision that it names.
            adapter_base: Base of an adapter, in place of the one that it names, as after that one was moved.

        Raises:
            ValueError: If there is no such model, or an adapter's base is missing.
        """
        source, revision = _split_revision(name)
        source = resolve_model(source)
        config = _adapter_config(source, revision)
        if config is None:
            return cls(name, source, revision)
        base: str | None = config.get("base_model_name_or_path")
        base_revision: str | None = config.get("revision")
        if adapter_base is not None:
            base, base_revision = _split_revision(adapter_base)
        base = None if base is None else resolve_model(base)
        _check_base(name, base, base_revision, adapter_base)
        return cls(name, str(base), base_revision, source, revision)

    def fingerprint(self) -> str:
        """Returns what identifies the model, as it was when first asked for."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        own = fingerprint(self.base, self.revision)
        return own if self.adapter is None else f"{own}+{fingerprint(self.adapter, self.adapter_revision)}"


def load_tokenizer(reference: ModelReference) -> PreTrainedTokenizerBase:
    """The tokenizer that goes with a model; an adapter's own where it has one.

    Raises:
        ValueError: If there is none.
    """
    source, revision = reference.base, reference.revision
    adapter, adapter_revision = reference.adapter, reference.adapter_revision
    if adapter is not None and _find_file(adapter, "tokenizer_config.json", adapter_revision):
        source, revision = adapter, adapter_revision
    try:
        config = AutoConfig.from_pretrained(reference.base, revision=reference.revision)  # an adapter has none
        return AutoTokenizer.from_pretrained(source, revision=revision, config=config)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {reference.name!r} has no tokenizer that can be loaded; save its base's beside it. ({error})"
        ) from error


def _check_base(name: str, base: str | None, revision: str | None, adapter_base: str | None) -> None:
    """Raises if an adapter's base is not to be had."""
    try:
        if base is not None and _find_file(base, CONFIG_NAME, revision) is not None:
            return
    except OSError:
        pass  # no folder, and not to be had from the hub
    if adapter_base is not None:
        raise ValueError(f"adapter_base={adapter_base!r} is no model here or on the hub; give its folder or hub id.")
    named = "names no base model" if base is None else f"was trained on {base!r}, which is not there (was it moved?)"
    raise ValueError(f"model {name!r} is an adapter that {named}; give the base with --adapter-base.")


def _split_revision(name: str) -> tuple[str, str | None]:
    """`org/name@revision` as its two parts; a path that holds the sign is left whole."""
    match = HUB_ID_AT_REVISION.fullmatch(name)
    return (name, None) if match is None or Path(name).exists() else (match["id"], match["revision"])


def _find_file(source: str, name: str, revision: str | None) -> str | None:
    """The path of a file of a model or an adapter, in its folder or in the hub's cache; `None` without such a file."""
    return cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)


def fingerprint(name_or_path: str, revision: str | None = None) -> str:
    """Returns what identifies a model: a hash of a local folder's files, or a hub id with its commit.

    Args:
        name_or_path: A hub id, or the folder of a model or of a PEFT adapter.
        revision: Branch, tag or commit of a hub id.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return f"{name_or_path}@{_commit(name_or_path, revision)}"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        is_part = path.name in CONFIG_FILES or path.suffix in WEIGHT_SUFFIXES
        if path.is_file() and is_part and path.name not in NOT_WEIGHTS:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _commit(hub_id: str, revision: str | None) -> str | None:
    """The commit of a model or adapter on the hub, as far as it can be told."""
    files = (_find_file(hub_id, name, revision) for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME))
    return next((extract_commit_hash(file, None) for file in files if file is not None), None)


def _adapter_config(source: str, revision: str | None) -> Mapping[str, Any] | None:
    """The adapter's configuration, or `None` for a full model."""
    try:
        config, adapter_config = (_find_file(source, name, revision) for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME))
    except OSError as error:
        raise ValueError(
            f"model {source!r} is no folder here, and not to be had from the hub either; give a checkpoint's folder "
            f"or a hub id. ({error})"
        ) from error
    if config is None and adapter_config is not None:
        remedy = "save or copy the adapter again"
        content = read_record(Path(adapter_config), remedy)
        if not isinstance(content.get("peft_type"), str):
            raise ValueError(f"{adapter_config} names no peft_type, so it is of no adapter of PEFT; {remedy}.")
        return content
    if config is None:
        raise ValueError(
            f"model {source!r} has no config.json and no adapter_config.json, here or on the hub; give a checkpoint's "
            "folder or a hub id."
        )
    return None
