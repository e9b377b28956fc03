"""What the forked processes of `forkserver.py` have imported; it is frozen, so that they never look through it."""

import gc

import tests.distributed.pipeline_fault_worker
import tests.distributed.pipeline_image_worker
import tests.trainers.resume_worker  # noqa: F401

gc.collect()
gc.freeze()
