import pytest

from lopt_hf.planner.units import gibibytes, read_bytes


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("80 GB", 80 * 10**9), ("1.5tib", 3 * 2**39), (" 512MiB ", 2**29)]
)
def test_sizes(text, size):
    assert read_bytes("device_memory", text) == size


@pytest.mark.parametrize("text", ["80", "80G", "GiB", "-3GiB", "0GiB", "eighty GiB", "80 KiBs", "4KB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="^device_memory=.* is no size of memory; write"):
        read_bytes("device_memory", text)


def test_gibibytes():
    assert (gibibytes(2**30), gibibytes(123.45 * 2**30)) == ("1.00", "123.5")
