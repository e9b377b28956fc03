"""Make a stock model of a pipeline's checkpoint: one that `from_pretrained` loads.

The stages of a language model are loaded one after the other, so memory stays at the largest of them. The model that
the run started from must be there: it has the weights that were not trained. A checkpoint of an image classifier has
all of it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lopt_hf.common.settings import check_folder
from lopt_hf.pipeline.runtime.checkpoint import Manifest
from lopt_hf.pipeline.runtime.export import export_checkpoint
from lopt_hf.pipeline.runtime.image.export import export_image_checkpoint, is_of_images
from lopt_hf.scripts.settings import OneLineParser

__all__ = ["main", "make_parser"]


def make_parser() -> OneLineParser:
    """Makes the parser of `lopt-hf pipeline export`."""
    parser = OneLineParser("pipeline export", __doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER", help="such as out/checkpoint-100")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="FOLDER", help="a new folder for the model")
    parser.add_argument(
        "--model", metavar="NAME", help="the model that the run started from, if it is not where it was then"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `lopt-hf pipeline export`.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    make_parser().run(_run, argv)


def _run(arguments: argparse.Namespace) -> None:
    check_folder("output_dir", arguments.output_dir)
    manifest = Manifest(arguments.checkpoint)
    if not is_of_images(manifest):
        export_checkpoint(arguments.checkpoint, arguments.output_dir, arguments.model)
    elif arguments.model is None:
        export_image_checkpoint(manifest, arguments.output_dir)
    else:
        raise ValueError(
            f"model={arguments.model!r} does nothing for an image classifier, whose checkpoint has its config; leave "
            "it out."
        )
    print(f"Model saved to {arguments.output_dir}")


if __name__ == "__main__":
    main()
