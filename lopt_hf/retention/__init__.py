"""What a fine-tuned model kept of what its base knew, and what it learned: measured on the same samples."""

from pathlib import Path

__all__ = ["METRIC_PATH"]

# For `evaluate.load`, which takes a folder
METRIC_PATH = str(Path(__file__).parent / "metric")
