"""The process of one method in `lopt-hf bench step`: a real trainer, whose steps wait for the parent's word."""

import os
import signal
from contextlib import ExitStack
from multiprocessing.connection import Connection
from time import perf_counter
from typing import TYPE_CHECKING, Any

from lopt_hf.bench.processes import failures_sent, peak_resident_bytes
from lopt_hf.bench.step_settings import BADAM_DEPTHS, LORA_RANK, StepBenchSettings, StepRow
from lopt_hf.bench.training import SHARED_ARGUMENTS, silence, token_rows
from lopt_hf.common.compared_methods import PEERS, REPL_EVERY, method_arguments, spread_layers
from lopt_hf.common.parent import end_with_spawner

if TYPE_CHECKING:
    from transformers import TrainerCallback
    from trl import SFTTrainer

    from lopt_hf.peers.base import Peer

__all__ = ["work"]


def work(connection: Connection, row: StepRow, settings: StepBenchSettings, checkpoint: str, folder: str) -> None:
    """Trains one method in this process, a step at each word of the parent, and sends what it cost.

    Args:
        connection: The pipe to the parent.
        row: The method.
        settings: What is measured.
        checkpoint: The model's folder or hub id.
        folder: Where a trainer may write.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends its processes
    end_with_spawner()
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL would report each trainer made here as a user's run
    with failures_sent(connection):
        connection.send(("finished", _train(connection, row, settings, checkpoint, f"{folder}/{row.name}")))


def _train(
    connection: Connection, row: StepRow, settings: StepBenchSettings, checkpoint: str, folder: str
) -> dict[str, Any]:
    import torch
    from transformers import PrinterCallback

    silence()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    trainer = _make_trainer(row, settings, checkpoint, folder)
    trainer.remove_callback(PrinterCallback)
    losses: list[float] = []
    trainer.add_callback(_make_pacer(connection, losses))
    trainer.train()
    cuda_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"losses": losses, "peak_resident_bytes": peak_resident_bytes(), "peak_cuda_bytes": cuda_bytes}


def _make_trainer(row: StepRow, settings: StepBenchSettings, checkpoint: str, folder: str) -> "SFTTrainer":
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = token_rows(tokenizer, settings.batch_size * row.total_steps, settings.seq_length, settings.seed)
    shared: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        "train_dataset": Dataset.from_dict({"input_ids": rows}),
        "processing_class": tokenizer,
    }
    arguments: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": row.total_steps,
        "per_device_train_batch_size": settings.batch_size,
        "bf16": settings.dtype == "bfloat16",
        "use_cpu": not torch.accelerator.is_available(),
        "gradient_checkpointing": row.method == "e2e_checkpointing",
        # what the non-reentrant form recomputes would stay unseen, see `SavedBytes`
        "gradient_checkpointing_kwargs": {"use_reentrant": True} if row.method == "e2e_checkpointing" else None,
        "seed": settings.seed,
        "max_length": None,
        **SHARED_ARGUMENTS,
    }
    if row.method in ("lopt", "lopt_local_step", "reach", "reach_local_step", "freeze"):
        from lopt_hf import LoPTConfig, LoPTTrainer

        arguments |= {
            "num_blocks": row.num_blocks,
            "split_at": None if settings.split_at is None else list(settings.split_at),
            "tied_embeddings": settings.tied_embeddings,
            "clip_scope": row.clip_scope,
            **method_arguments(row.method, row.num_blocks, row.task_reach or None),
        }
        if not row.task_reach:
            arguments["local_update_interval"] = row.interval
        return LoPTTrainer(args=LoPTConfig(**arguments), **shared)
    if row.method == "mlaan":
        from lopt_hf import MLAANConfig, MLAANTrainer

        arguments |= {
            "num_blocks": row.num_blocks,
            "split_at": None if settings.split_at is None else list(settings.split_at),
            "tied_embeddings": settings.tied_embeddings,
            **method_arguments(row.method, row.num_blocks),
        }
        return MLAANTrainer(args=MLAANConfig(**arguments), **shared)
    if row.method in PEERS:
        shared["callbacks"] = [_make_peer(row, settings, shared["model"].config)]
    if row.method == "e2e_step_in_backward":
        arguments["max_grad_norm"] = 0.0  # it cannot clip all gradients together
    if row.method == "lora":
        shared["peft_config"] = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    if row.method == "repl":
        from lopt_hf import RepLConfig, get_repl_model

        # What the surrogates start from changes no arithmetic.
        config = RepLConfig(placement="every", every=REPL_EVERY, init="skip")
        shared["model"] = get_repl_model(shared["model"], config)
    return SFTTrainer(args=SFTConfig(**arguments), **shared)


def _make_peer(row: StepRow, settings: StepBenchSettings, config: Any) -> "Peer":
    """The callback of a peer; BAdam's layers change at every step, so that a cycle over the depth is short."""
    from lopt_hf.peers.arguments import PeerArguments
    from lopt_hf.peers.layer_switching import BAdam

    if row.method == "badam":
        num_layers = config.get_text_config(decoder=True).num_hidden_layers
        return BAdam(period=1, order=spread_layers(num_layers, BADAM_DEPTHS))
    split_at = None if settings.split_at is None else list(settings.split_at)
    return PeerArguments(num_blocks=row.num_blocks, split_at=split_at).make_peer(row.method)


def _make_pacer(connection: Connection, losses: list[float]) -> "TrainerCallback":
    """A callback that makes each step wait for the parent's word, and reports what the step before it cost."""
    import torch
    from transformers import TrainerCallback

    from lopt_hf.meters.gradient_bytes import GradientBytes
    from lopt_hf.meters.optimizer_bytes import state_bytes, stepped_weights
    from lopt_hf.meters.saved_bytes import SavedBytes

    def now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return perf_counter()

    class Pacer(TrainerCallback):
        def __init__(self) -> None:
            self.memory: tuple[SavedBytes, GradientBytes] | None = None
            self.counting = ExitStack()
            self.cost: float | tuple[int, int, int] | None = None
            self.start = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            connection.send(("ready", self.cost))
            if connection.recv() == "memory":
                optimizer = kwargs["optimizer"]
                saved = self.counting.enter_context(SavedBytes.of_training(kwargs["model"], optimizer))
                self.memory = saved, self.counting.enter_context(GradientBytes(stepped_weights(optimizer)))
            self.start = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            self.cost = now() - self.start
            if self.memory is not None:
                self.counting.close()
                self.cost = self.memory[0].peak, self.memory[1].peak, state_bytes(kwargs["optimizer"])
                self.memory = None
            control.should_log = True  # for the loss of this very step; the log is made outside the timed span
            return control

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "loss" in kwargs["logs"]:
                losses.append(kwargs["logs"]["loss"])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            connection.send(("ready", self.cost))
            connection.recv()  # tearing down costs time that others are still measuring

    return Pacer()
