"""Supervised fine-tuning with MLAAN: another name of `lopt-hf sft --method mlaan`.

```bash
lopt-hf mlaan --config smollm2-135m/mlaan/k4
lopt-hf mlaan --config smollm2-135m/mlaan/k4 --window 1 --leap_layers '[6, 4, 2]' --leap last
lopt-hf mlaan --accelerate_config ddp_2 --config ...
```
"""

import sys
from collections.abc import Sequence

from trl import TrlParser

from lopt_hf.scripts import sft

__all__ = ["main", "make_parser"]


def make_parser() -> TrlParser:
    """Makes the parser of this command: that of `lopt-hf sft --method mlaan`."""
    return sft.make_parser("mlaan", "mlaan", __doc__)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves and, if asked to, pushes a model."""
    sft.main(["--method", "mlaan", *(sys.argv[1:] if argv is None else argv)], command="mlaan", description=__doc__)


if __name__ == "__main__":
    main()
