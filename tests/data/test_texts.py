"""Text that cannot be read is named with its setting and file."""

from pathlib import Path

import pytest

from lopt_hf.data.texts import read_text


def test_a_file_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("Caf\u00e9".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"^calibration='.*text\.txt': byte 4 \(0xe9\) of .*text\.txt is no UTF-8; save"
    ):
        read_text(str(path), "calibration")
