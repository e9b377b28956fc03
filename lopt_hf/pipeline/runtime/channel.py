"""The bounded queue between two stages, over point-to-point messages of `torch.distributed`.

A message is a header of fixed size (which batch, its checksum, data type and shape) and the hidden states. Both ends
are threads: the sender's takes a message as soon as the forward has made it, the receiver's fetches ahead what the
stage will need next. Each holds at most `depth` messages, and a send is through only when it is received, so a slow
stage makes its predecessor wait instead of filling memory.
"""

import queue
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lopt_hf.pipeline.runtime.health import PeerMonitor, PipelineError

__all__ = ["BatchId", "ReceivingChannel", "SendingChannel"]

POLL_SECONDS = 0.2
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_DIMENSIONS = 4  # of feature maps: batch, channels, height, width; token states have three
HEADER_SIZE = 4 + MOST_DIMENSIONS  # step, micro-batch, checksum, dtype, and the sizes, -1 where there is no dimension
END = -1  # in place of the step: no message follows


@dataclass(frozen=True)
class BatchId:
    """Which micro-batch a message belongs to.

    Attributes:
        step: Optimizer step, from 0.
        micro_batch: Micro-batch of that step, from 0.
        checksum: Of the batch as the sender has it.
    """

    step: int
    micro_batch: int
    checksum: int

    @classmethod
    def of(cls, inputs: Mapping[str, Any], step: int, micro_batch: int) -> "BatchId":
        """Names a micro-batch; the checksum is of all its tensors, so that tokens, masks and labels are compared.

        Args:
            inputs: The micro-batch as its trainer has it.
            step: See above.
            micro_batch: See above.
        """
        checksum = 0
        for name in sorted(inputs):
            value = inputs[name]
            if isinstance(value, torch.Tensor):
                values = value.detach().cpu().reshape(-1).view(torch.uint8)  # NumPy has no bf16
                checksum = zlib.crc32(values.numpy().data, zlib.crc32(name.encode(), checksum))
        return cls(step, micro_batch, checksum)

    def __str__(self) -> str:
        return f"step {self.step + 1}, micro-batch {self.micro_batch + 1}"


@dataclass
class _Message:
    batch: BatchId
    hidden_BTD: torch.Tensor
    ready: Any = None  # a device event after which the tensor may be read


class _Channel:
    """One end: a thread that moves messages between a bounded queue and the other process."""

    def __init__(self, peer: int, group: dist.ProcessGroup, depth: int, device: torch.device, monitor: PeerMonitor):
        self.peer = peer
        self.group = group
        self.device = device
        self.monitor = monitor
        self._queue: queue.Queue[_Message | None] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lopt_hf channel to rank {peer}", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """How many messages wait in this end at the moment."""
        return self._queue.qsize()

    def _run(self) -> None:
        if self.device.type != "cpu":  # untested on GPU
            torch.accelerator.set_device_index(self.device.index or 0)
        try:
            self._move()
        except PipelineError:
            pass  # the monitor has it, and the main thread raises it
        except RuntimeError as error:
            if not self._closed.is_set():
                self.monitor.lost(self.peer, str(error).splitlines()[0])

    def _move(self) -> None:
        raise NotImplementedError

    def _put(self, message: _Message | None) -> None:
        while not self._closed.is_set():
            self.monitor.check()
            try:
                return self._queue.put(message, timeout=POLL_SECONDS)
            except queue.Full:
                continue

    def _get(self) -> _Message | None:
        while True:
            self.monitor.check()
            try:
                return self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue

    def _record(self) -> Any:
        if self.device.type == "cpu":
            return None
        event = torch.Event(self.device)
        event.record()
        return event


class SendingChannel(_Channel):
    """The end through which a stage hands its output to the next one.

    Args:
        peer: Global rank of the next stage's process.
        group: Process group of these two alone.
        depth: Messages that may wait here.
        device: Where the hidden states are.
        monitor: What is told of a broken connection, and asked for one while waiting.
    """

    def put(self, batch: BatchId, hidden_BTD: torch.Tensor) -> None:
        """Queues hidden states, waiting while the channel is full.

        Args:
            batch: Which micro-batch it is.
            hidden_BTD: Shape (B, T, D), or (B, C, H, W). It must not be changed afterwards.

        Raises:
            PipelineError: If the pipeline is broken.
        """
        if hidden_BTD.dtype not in DTYPES:
            raise TypeError(f"hidden states of {hidden_BTD.dtype} cannot be sent; train in one of {DTYPES}.")
        hidden_BTD = hidden_BTD.detach().contiguous()
        self._put(_Message(batch, hidden_BTD, self._record()))

    def close(self) -> None:
        """Waits until all that was put has been received."""
        self._put(None)
        while self._thread.is_alive():
            self.monitor.check()
            self._thread.join(POLL_SECONDS)
        self._closed.set()

    def _move(self) -> None:
        while (message := self._get()) is not None:
            batch, hidden_BTD = message.batch, message.hidden_BTD
            dtype = DTYPES.index(hidden_BTD.dtype)
            sizes = [*hidden_BTD.shape, *[-1] * (MOST_DIMENSIONS - hidden_BTD.ndim)]
            header = torch.tensor([batch.step, batch.micro_batch, batch.checksum, dtype, *sizes])
            if message.ready is not None:
                message.ready.wait()
            for work in [dist.isend(tensor, self.peer, group=self.group) for tensor in (header, hidden_BTD)]:
                _wait_for(work)
            if message.ready is not None:  # the memory may be reused when the stream has read it
                torch.accelerator.current_stream(self.device).synchronize()
        _wait_for(dist.isend(torch.full((HEADER_SIZE,), END), self.peer, group=self.group))


class ReceivingChannel(_Channel):
    """The end from which a stage takes the previous one's output; the arguments are those of `SendingChannel`."""

    def get(self, batch: BatchId) -> torch.Tensor:
        """Takes the hidden states of the next micro-batch, waiting until they are there.

        Args:
            batch: The micro-batch as this stage has it.

        Returns:
            Hidden states in the shape that they were sent in, without a graph.

        Raises:
            PipelineError: If the pipeline is broken, or if the two stages do not train on the same batch.
        """
        message = self._get()
        if message is None:
            raise self._differs(f"rank {self.peer} ended its training before {batch}")
        if message.batch != batch:
            raise self.monitor.fail(
                f"rank {self.peer} and rank {self.monitor.rank} train on different data: {message.batch} with "
                f"checksum {message.batch.checksum:08x} against {batch} with {batch.checksum:08x}; every stage must "
                "read the same files with the same tokenizer, seed and versions"
            )
        if message.ready is not None:
            message.ready.wait()
        return message.hidden_BTD

    def close(self) -> None:
        """Makes sure that nothing is left: the previous stage ended at the same step.

        Raises:
            PipelineError: If the pipeline is broken, or if the previous stage goes on.
        """
        message = self._get()
        if message is not None:
            raise self._differs(f"rank {self.peer} goes on with {message.batch} after rank {self.monitor.rank} ended")
        self._closed.set()

    def _differs(self, what: str) -> PipelineError:
        return self.monitor.fail(f"{what}; give all processes the same data and the same number of steps")

    def _move(self) -> None:
        while True:
            header = torch.empty(HEADER_SIZE, dtype=torch.int64)
            _wait_for(dist.irecv(header, self.peer, group=self.group))
            step, micro_batch, checksum, dtype, *sizes = header.tolist()
            if step == END:
                return self._put(None)
            shape = [size for size in sizes if size >= 0]
            hidden_BTD = torch.empty(shape, dtype=DTYPES[dtype], device=self.device)
            _wait_for(dist.irecv(hidden_BTD, self.peer, group=self.group))
            self._put(_Message(BatchId(step, micro_batch, checksum), hidden_BTD, self._record()))


def _wait_for(work: dist.Work | None) -> None:
    assert work is not None  # it is for processes outside the group
    work.wait()
