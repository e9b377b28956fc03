"""The processes of a pipeline that `accelerate launch` started, as a world of stages and replicas."""

import itertools
import json
import math
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lopt_hf.common.distributed import new_group
from lopt_hf.common.launching import LAUNCHER, ON_THIS_HOST
from lopt_hf.pipeline.runtime.health import PeerMonitor

__all__ = [
    "PipelineWorld",
    "Rendezvous",
    "check_one_device",
    "check_same",
    "choose_interface",
    "init_world",
    "launch_command",
    "rank_name",
]

# What tells accelerate and transformers that they are one of several processes. Each stage is a training run of its
# own, which shares no batch and no gradient with the others, so they must not see the world.
_WORLD_VARIABLES = [f"{scope}{name}" for scope in ("", "LOCAL_", "GROUP_", "ROLE_") for name in ("RANK", "WORLD_SIZE")]
# Waiting for another process has no end of its own: a stage may take long. `PeerMonitor` notices who is gone.
WAIT = timedelta(days=1)
INTERFACE = "GLOO_SOCKET_IFNAME"  # gloo's own variable

# Where a process reads which devices it may use, by their kind; accelerate's `--gpu_ids` sets the same ones.
_VISIBLE_DEVICES = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "mlu": "MLU_VISIBLE_DEVICES",
    "musa": "MUSA_VISIBLE_DEVICES",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
    "sdaa": "SDAA_VISIBLE_DEVICES",
    "xpu": "ZE_AFFINITY_MASK",
}

_REFUSED_ENGINES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


@dataclass(frozen=True)
class Rendezvous:
    """This process's place in the world that the launcher set up.

    Attributes:
        store: Key-value store that all processes share; the launcher's agent hosts it.
        rank: Global rank.
        world_size: Number of processes.
        local_rank: Rank on this host.
        has_device: Whether the host has an accelerator for it; then that is all that it sees, at index 0.
    """

    store: dist.Store
    rank: int
    world_size: int
    local_rank: int
    has_device: bool = True

    @classmethod
    def from_environment(cls) -> "Rendezvous":
        """Connects to the store, and takes the world out of the environment, so that the stage trains as one process.

        For the same reason it leaves the process one accelerator to see: call it before anything uses one, and before
        the training arguments are made. Where a library has used one while it was imported, the process begins anew.

        Raises:
            ValueError: If the process was not launched as one of several, or for an engine that shards the model.
        """
        for name in _REFUSED_ENGINES:
            if os.environ.get(name, "false").lower() in ("1", "true"):
                raise ValueError(
                    f"{name}={os.environ[name]}: the pipeline cuts the model itself and does not combine with FSDP, "
                    "DeepSpeed or Megatron; launch with an accelerate config without it."
                )
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise ValueError("RANK and WORLD_SIZE are not set; start the pipeline with `accelerate launch`.")
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        has_device = _see_one_device(local_rank)
        shared, rank, world_size = next(dist.rendezvous("env://"))
        choose_interface(os.environ["MASTER_ADDR"])
        # The launcher's store outlives a restart; what an earlier attempt left in it must not count.
        store = dist.PrefixStore(f"lopt_hf/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", shared)
        store.set_timeout(WAIT)
        for name in _WORLD_VARIABLES:
            os.environ.pop(name, None)
        return cls(store, rank, world_size, local_rank, has_device)


def _see_one_device(local_rank: int) -> bool:
    """Leaves this process the accelerator of its local rank alone: one that trains alone would take all it sees.

    Where there is none for it, all stay visible; the run may be one on the CPU.

    Returns:
        Whether there is one.
    """
    kind, number = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    if kind is None or local_rank >= number:
        return False
    name = _VISIBLE_DEVICES.get(kind.type)
    if number == 1 or name is None:
        return True
    visible = os.environ.get(name)
    os.environ[name] = visible.split(",")[local_rank].strip() if visible else str(local_rank)
    if torch.get_device_module(kind).is_initialized():
        # By then the driver has read the list (PEFT imports bitsandbytes, which asks every device what it can do).
        os.environ["LOCAL_RANK"] = "0"
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return True


def check_one_device(args: Any) -> None:
    """Raises `ValueError` if training arguments are of several accelerators, over which batches would be spread.

    Args:
        args: Training arguments.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu={args.n_gpu}, but a stage trains on one accelerator; make the training arguments after "
            "`Rendezvous.from_environment()`, which leaves it one to see."
        )


@dataclass(frozen=True)
class PipelineWorld:
    """The processes of a run as a mesh of stages and replicas.

    Attributes:
        store: The store of the run.
        rank: Global rank of this process.
        mesh: Device mesh of the dimensions `stage` and `data`.
        stage: Stage of this process.
        replica: Which of the stage's data-parallel replicas it is.
        previous: Group of this process and the one that sends to it, if there is one.
        next: Group of this process and the one that it sends to, if there is one.
        monitor: Watches the neighbours and the store.
        previous_back: As `previous`, for what goes the other way; only where gradients do.
        next_back: As `next`, likewise.
        runs: Numbers the training runs in this world.
    """

    store: dist.Store
    rank: int
    mesh: DeviceMesh
    stage: int
    replica: int
    previous: dist.ProcessGroup | None
    next: dist.ProcessGroup | None
    monitor: PeerMonitor
    previous_back: dist.ProcessGroup | None = None
    next_back: dist.ProcessGroup | None = None
    runs: Iterator[int] = field(default_factory=itertools.count)

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return self.mesh.size(0)

    @property
    def num_replicas(self) -> int:
        """Number of data-parallel replicas of each stage."""
        return self.mesh.size(1)

    def new_run_store(self) -> dist.Store:
        """A part of the store for one more run; all processes must start their runs in the same order."""
        return dist.PrefixStore(f"run/{next(self.runs)}", self.store)

    @property
    def reports(self) -> bool:
        """Whether this process tells the user how the run goes: the first with the task loss."""
        return self.stage == self.num_stages - 1 and self.replica == 0

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The replicas of this stage, over which its gradients are averaged."""
        return self.mesh.get_group("data")

    def rank_of(self, stage: int, replica: int | None = None) -> int:
        """Global rank of a stage's process, by default of the same replica."""
        return int(self.mesh.mesh[stage, self.replica if replica is None else replica])


def rank_name(rank: int, data_parallel: int) -> str:
    """Returns what a process is called in messages."""
    stage, replica = divmod(rank, data_parallel)
    return f"rank {rank} (stage {stage}{f', replica {replica}' if data_parallel > 1 else ''})"


def check_same(
    store: dist.Store, monitor: PeerMonitor, world_size: int, topic: str, settings: Mapping[str, Any]
) -> None:
    """Checks that all processes have the same settings; each waits for all others.

    Args:
        store: The store of the run.
        monitor: Knows of failures elsewhere.
        world_size: Number of processes.
        topic: Name of this comparison, unique in a run.
        settings: Values that JSON can hold, by name.

    Raises:
        ValueError: If this process has another value than rank 0, or one of the two has none.
    """
    key = f"same/{topic}"
    if monitor.rank == 0:
        store.set(key, json.dumps(settings))
    first = json.loads(monitor.wait_for(store, key))
    for name in (*first, *(name for name in settings if name not in first)):
        if name not in settings or name not in first or settings[name] != first[name]:
            own = f"{name}={settings[name]!r}" if name in settings else f"no {name}"
            other = repr(first[name]) if name in first else "none"
            raise ValueError(f"rank {monitor.rank} was given {own}, but rank 0 {other}; give all processes the same.")
    monitor.barrier(store, key, world_size)


def init_world(
    rendezvous: Rendezvous,
    num_stages: int,
    data_parallel: int,
    device_type: str,
    peer_timeout: float,
    start_timeout: float = math.inf,
    settings: Mapping[str, Any] | None = None,
    sends_back: bool = False,
) -> PipelineWorld:
    """Initialises the process groups: the world, each stage's replicas, and each pair of neighbours.

    Args:
        rendezvous: This process's place.
        num_stages: Stages of the pipeline.
        data_parallel: Replicas of each stage.
        device_type: `"cpu"` (gloo) or `"cuda"` and the like (their own backend, untested; gloo for headers).
        peer_timeout: Seconds of silence after which a process counts as lost.
        start_timeout: Seconds that another process may take to start.
        settings: Arguments that must be the same on all processes.
        sends_back: Whether gradients go from stage to stage, against the hidden states.

    Raises:
        ValueError: If the launcher started another number of processes, one of them has other settings, or there is no
            accelerator for this one.
    """
    needed = num_stages * data_parallel
    if rendezvous.world_size != needed:
        raise ValueError(
            f"num_processes={rendezvous.world_size}, but num_stages={num_stages} x data_parallel={data_parallel} "
            f"needs {needed}; launch {needed} processes, or change the stages."
        )
    if device_type != "cpu" and not rendezvous.has_device:
        number = torch.accelerator.device_count()
        raise ValueError(
            f"LOCAL_RANK={rendezvous.local_rank}, but this host has {number} accelerator{'s' * (number > 1)} and a "
            f"process needs one of its own; launch at most {number} here, or train on the CPU with use_cpu=True."
        )
    stage, replica = divmod(rendezvous.rank, data_parallel)
    neighbours = [other * data_parallel + replica for other in (stage - 1, stage + 1) if 0 <= other < num_stages]
    replicas = [stage * data_parallel + other for other in range(data_parallel) if other != replica]
    peers = {rank: rank_name(rank, data_parallel) for rank in (*neighbours, *replicas)}
    monitor = PeerMonitor(rendezvous.store, rendezvous.rank, peers, peer_timeout, start_timeout)
    check_same(rendezvous.store, monitor, rendezvous.world_size, "arguments", settings or {})
    backend = "gloo"
    if device_type != "cpu":
        torch.accelerator.set_device_index(0)  # all that it sees
        backend = f"cpu:gloo,{device_type}:{dist.get_default_backend_for_device(device_type)}"
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("world", rendezvous.store),
            rank=rendezvous.rank,
            world_size=rendezvous.world_size,
            timeout=WAIT,
        )
        mesh = init_device_mesh(device_type, (num_stages, data_parallel), mesh_dim_names=("stage", "data"))
        links = _link_stages(mesh, rendezvous.rank)
        # Apart from those: a backend may keep the messages of a group in one order for both directions.
        back = _link_stages(mesh, rendezvous.rank) if sends_back else {}
    except RuntimeError as error:
        advice = (
            f" The network interface was {os.environ.get(INTERFACE)!r}; set {INTERFACE} on each host to the one "
            "through which the hosts reach each other."
        )
        raise monitor.explain(error, rank_name(rendezvous.rank, data_parallel), advice) from error
    return PipelineWorld(
        store=rendezvous.store,
        rank=rendezvous.rank,
        mesh=mesh,
        stage=stage,
        replica=replica,
        previous=links.get(stage - 1),
        next=links.get(stage),
        monitor=monitor,
        previous_back=back.get(stage - 1),
        next_back=back.get(stage),
    )


def _link_stages(mesh: DeviceMesh, rank: int) -> dict[int, dist.ProcessGroup]:
    """The groups of this process and each neighbour, by the first stage of the two."""
    # Every process takes part in making every group, also those that it is not in, in the same order.
    links: dict[int, dist.ProcessGroup] = {}
    for first in range(mesh.size(0) - 1):
        for replica in range(mesh.size(1)):
            pair = [int(mesh.mesh[first, replica]), int(mesh.mesh[first + 1, replica])]
            group = new_group(pair)
            if rank in pair:
                links[first] = group
    return links


def choose_interface(main_address: str) -> None:
    """Lets gloo listen where other hosts reach this one: at the interface through which it reaches the main one.

    Gloo's own choice, the address of the host's name, is the loopback's on many systems, and on others is not.

    Args:
        main_address: Of the main host; the loopback's where all processes are of this one.
    """
    if INTERFACE in os.environ:
        return
    family, kind, *_, address = socket.getaddrinfo(main_address, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing, and has the system choose the way
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if own in [entry.address for entry in addresses]:
            os.environ[INTERFACE] = name


def launch_command(num_processes: int, arguments: Sequence[str], launcher_arguments: Sequence[str] = ()) -> list[str]:
    """The `accelerate launch` command line that starts a pipeline on this host.

    Args:
        num_processes: Stages times replicas.
        arguments: Arguments of the pipeline.
        launcher_arguments: Further arguments of `accelerate launch`.
    """
    command = [*LAUNCHER, *ON_THIS_HOST, "--multi_gpu"]
    command += ["--num_processes", str(num_processes), "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", *launcher_arguments]
    return [*command, "-m", "lopt_hf.scripts.pipeline", *arguments]
