"""The links of a stage's process to those of the stages beside it."""

from dataclasses import dataclass
from typing import Any

from lopt_hf.pipeline.runtime.channel import ReceivingChannel, SendingChannel
from lopt_hf.pipeline.runtime.launch import PipelineWorld
from lopt_hf.pipeline.runtime.stage_plan import StagePlan

__all__ = ["StageLinks"]


@dataclass(frozen=True)
class StageLinks:
    """The channels of a process, of which the stages at the ends and runs without late gradients have some only.

    Attributes:
        receiver: Where the hidden states come from that the stage starts from.
        sender: Where those go that it ends with.
        back_receiver: Where the cotangents of its outputs come from.
        back_sender: Where those of its inputs go.
    """

    receiver: ReceivingChannel | None = None
    sender: SendingChannel | None = None
    back_receiver: ReceivingChannel | None = None
    back_sender: SendingChannel | None = None

    @classmethod
    def open(cls, world: PipelineWorld, plan: StagePlan, args: Any) -> "StageLinks":
        """Opens the channels of a run.

        Args:
            world: Its processes.
            plan: The stage.
            args: Training arguments.

        Raises:
            ValueError: If gradients are to go back, and the world was made without a way for them.
        """
        shared: dict[str, Any] = {"device": args.device, "monitor": world.monitor}
        depth = args.channel_depth
        receiver, sender, back_receiver, back_sender = None, None, None, None
        if args.sends_gradients_back and world.previous_back is None and world.next_back is None:
            raise ValueError(
                f"gradient={args.gradient!r} needs a world in which gradients go back; pass sends_back=True to "
                "`init_world`."
            )
        if world.previous is not None:
            peer = world.rank_of(plan.index - 1)
            receiver = ReceivingChannel(peer, world.previous, depth=depth, **shared)
            if args.sends_gradients_back and world.previous_back is not None:
                back_sender = SendingChannel(peer, world.previous_back, depth=depth, **shared)
        if world.next is not None:
            peer = world.rank_of(plan.index + 1)
            sender = SendingChannel(peer, world.next, depth=depth, **shared)
            if args.sends_gradients_back and world.next_back is not None:
                # The cotangents of a step: this stage takes them while it runs the next one forward, and must not
                # wait there for the next stage to take what it sends while that waits for it.
                depth = max(depth, args.gradient_accumulation_steps)
                back_receiver = ReceivingChannel(peer, world.next_back, depth=depth, **shared)
        return cls(receiver, sender, back_receiver, back_sender)

    def close(self) -> None:
        """Waits until all that was sent has been received, and makes sure that nothing else comes.

        Raises:
            PipelineError: If the pipeline is broken, or if a neighbour goes on.
        """
        for end in (self.receiver, self.sender, self.back_receiver, self.back_sender):
            if end is not None:
                end.close()
