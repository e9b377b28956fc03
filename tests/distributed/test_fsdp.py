"""The joint local backward under FSDP2: sharded over two gloo processes, the gradients are the whole model's."""


def test_joint_gradients_are_those_of_the_whole_model(two_processes):
    """Which `fsdp_gradients.py` asserts on each rank."""
    assert all((two_processes.folder / f"fsdp-{rank}").exists() for rank in range(2)), two_processes.errors
