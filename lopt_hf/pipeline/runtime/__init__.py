"""The running pipeline: stages, the channels between them, launch, health, checkpoints and logs."""
