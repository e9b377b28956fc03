"""Objectives under the name that they had before `lopt_hf.local`; scripts of users import it."""

from lopt_hf.local.objectives import LocalBatch, LocalObjective, ReconstructionHead, ReconstructionObjective

__all__ = ["LocalBatch", "LocalObjective", "ReconstructionHead", "ReconstructionObjective"]
