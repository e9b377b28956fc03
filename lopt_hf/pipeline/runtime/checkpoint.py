"""The format of a pipeline's checkpoints, and how one becomes complete.

A checkpoint is a folder with one sub-folder per stage. Each stage writes its own into a folder of another name; the
one that is done last adds the manifest and gives the folder its name. So there is no moment at which all wait for each
other, and a kill at any moment leaves the previous checkpoint the last one. All stages must see the same file system.
"""

import json
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from lopt_hf.common.files import publish_folder
from lopt_hf.local.blocks import Block
from lopt_hf.pipeline.runtime.health import PeerMonitor
from lopt_hf.pipeline.runtime.stage_plan import StagePlan
from lopt_hf.trainers.checkpoint import read_json

__all__ = [
    "INCOMPLETE",
    "WEIGHTS_FILE",
    "Manifest",
    "check_no_other_model",
    "check_shared_folder",
    "load_weights",
    "may_start_anew",
    "publish_when_complete",
    "remove_incomplete",
    "save_weights",
]

INCOMPLETE = "incomplete-"  # how the name of what is being written starts
INCOMPLETE_NAMES = re.compile(rf"{INCOMPLETE}({PREFIX_CHECKPOINT_DIR}-\d+|mark-[0-9a-f]{{32}}|model)")
SHARED_FOLDER_SECONDS = 10.0  # ours: for a network disk to show what another host wrote
MANIFEST_FILE = "pipeline.json"
WEIGHTS_FILE = "weights.safetensors"


def check_no_other_model(output_dir: Path) -> None:
    """Checks that a run of a whole model, not of an adapter, does not find another run's model in its folder.

    Raises:
        ValueError: If it does.
    """
    if (output_dir / SAFE_WEIGHTS_NAME).exists():
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds another run's model ({SAFE_WEIGHTS_NAME}), which would be loaded "
            "in place of this run's; choose another output_dir."
        )


def may_start_anew(args: Any) -> bool:
    """Tells whether a run may save its model over one in its folder: it goes on, or is a job that begins again."""
    return str(args.resume_from_checkpoint or "false").lower() != "false"


class Manifest:
    """Which stages a checkpoint is of; it is written when all of them are complete.

    Args:
        folder: The checkpoint.

    Raises:
        ValueError: If the folder is not a complete checkpoint of a pipeline, or the manifest is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST_FILE
        if not path.is_file():
            raise ValueError(
                f"checkpoint={str(folder)!r} has no {MANIFEST_FILE}: it is not a complete checkpoint of a pipeline; "
                "name another one."
            )
        # One that names no gradient is from before there was another than that of local objectives.
        self.content: dict[str, Any] = {"gradient": "local", **read_json(path, str(folder))}

    @staticmethod
    def write(folder: Path, plans: Sequence[StagePlan], details: Mapping[str, Any]) -> None:
        """Writes the manifest of a finished checkpoint."""
        stages = [{"name": plan.name, "blocks": [block.index for block in plan.blocks]} for plan in plans]
        content = {"stages": stages, "num_layers": plans[0].num_layers, **details}
        (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")

    def check(self, name: str, value: Any) -> None:
        """Raises `ValueError` if the run that wrote the checkpoint had another value of a setting.

        Args:
            name: The setting.
            value: That of this run.
        """
        saved = self.content.get(name)
        if saved != value:
            raise ValueError(
                f"resume_from_checkpoint={str(self.folder)!r} was trained with {name}={saved}, but this "
                f"run has {name}={value}; resume with the same, or start anew in another output_dir."
            )

    def check_run(self, data_parallel: int, gradient_settings: Mapping[str, Any]) -> None:
        """Raises `ValueError` if a run cannot go on from the checkpoint.

        Args:
            data_parallel: Replicas of the run.
            gradient_settings: Its settings that no run with gradients on their way can change, by name.
        """
        for name, value in {"data_parallel": data_parallel, **gradient_settings}.items():
            self.check(name, value)

    @property
    def revision(self) -> str:
        """Branch, tag or commit of the model that the run started from, where that is on the hub."""
        return self.content.get("model_revision") or "main"  # as before it was noted

    @property
    def stage_folders(self) -> list[Path]:
        """The stages' folders, in their order."""
        return [self.folder / stage["name"] for stage in self.content["stages"]]

    @property
    def plans(self) -> list[StagePlan]:
        """The stages that wrote the checkpoint."""
        edges = [0, *self.content["split_at"], self.content["num_layers"]]
        blocks = [Block(i, start, stop) for i, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True))]
        stages = self.content["stages"]
        return [
            StagePlan(index, len(stages), tuple(blocks[i] for i in stage["blocks"]), edges[-1])
            for index, stage in enumerate(stages)
        ]

    def folder_for(self, plan: StagePlan) -> Path:
        """The stage's folder whose trainer state a stage goes on from: its own, if the stages are the same.

        The last stage takes the last one's, which has the task's logs; another the one that had its first block.
        """
        if plan.is_last:
            return self.stage_folders[-1]
        first = plan.blocks[0].index
        stages = self.content["stages"]
        return next(self.folder / stage["name"] for stage in stages if first in stage["blocks"])


def save_weights(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes weights under their own names."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)


@torch.no_grad()
def load_weights(tensors: Mapping[str, torch.Tensor], folders: Iterable[Path], file_name: str = WEIGHTS_FILE) -> None:
    """Copies weights into `tensors` from whichever folders hold them.

    Raises:
        ValueError: If one is in none of the folders.
    """
    missing = set(tensors)
    for folder in folders:
        if not (folder / file_name).is_file():
            continue
        with safe_open(folder / file_name, framework="pt") as file:
            for name in missing & set(file.keys()):
                tensors[name].copy_(file.get_tensor(name))
            missing -= set(file.keys())
    if missing:
        raise ValueError(f"The checkpoint has no weights of {sorted(missing)[0]!r}; it is from another run.")


def publish_when_complete(
    store: dist.Store, staged: Path, final: Path, plans: Sequence[StagePlan], details: Any, num_parts: int
) -> bool:
    """Notes that one more part is written; the last one adds the manifest and renames the folder.

    Args:
        store: The store that all processes share.
        staged: The folder that they write into, as `<incomplete folder>/<name>`.
        final: Its name when it is complete.
        plans: All stages.
        details: Further content of the manifest.
        num_parts: How many processes write.

    Returns:
        Whether this call made the checkpoint complete.

    Raises:
        FileNotFoundError: If a stage's part is no longer there.
    """
    if store.add(f"saved/{final.name}", 1) < num_parts:
        return False
    lost = [plan.name for plan in plans if not (staged / plan.name).is_dir()]
    if lost:
        raise FileNotFoundError(
            f"output_dir={str(final.parent)!r}: {lost[0]} of {final.name} was written and is gone, so that the "
            "checkpoint would not be whole; leave the folder to this run, and go on from the checkpoint before."
        )
    Manifest.write(staged, plans, details)
    publish_folder(staged, final)
    return True


def remove_incomplete(output_dir: Path) -> None:
    """Removes what a run that was killed while it saved has left; the disk may be full of it."""
    for folder in output_dir.glob(f"{INCOMPLETE}*"):
        if INCOMPLETE_NAMES.fullmatch(folder.name):  # a folder of the user's own may start alike
            shutil.rmtree(folder, ignore_errors=True)


def check_shared_folder(store: dist.Store, monitor: PeerMonitor, world_size: int, folder: Path) -> None:
    """Makes sure that all processes mean the same folder by a path: on several hosts it must be on a shared disk.

    Raises:
        ValueError: If what rank 0 writes does not appear here.
    """
    if monitor.rank == 0:
        mark = folder / f"{INCOMPLETE}mark-{uuid.uuid4().hex}"
        mark.mkdir(parents=True)
        store.set("mark", mark.name)
    mark = folder / monitor.wait_for(store, "mark")
    end = time.monotonic() + SHARED_FOLDER_SECONDS
    while not mark.is_dir():
        if time.monotonic() > end:
            raise ValueError(
                f"output_dir={str(folder)!r} is not the same folder on rank {monitor.rank} as on rank 0, and a "
                "checkpoint needs the parts of all stages in one; choose a folder that all hosts share."
            )
        time.sleep(0.1)
    monitor.barrier(store, "mark", world_size)
    if monitor.rank == 0:
        mark.rmdir()
