"""Retention and gain of fine-tuned models, measured on the same samples as their base."""

from pathlib import Path

__all__ = ["METRIC_PATH"]

# For `evaluate.load`, which takes a folder
METRIC_PATH = str(Path(__file__).parent / "metric")
