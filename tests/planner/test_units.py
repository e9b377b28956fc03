import pytest

from lopt_hf.planner.units import read_bytes, size_text, suitable_unit


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("80 GB", 80 * 10**9), ("1.5tib", 3 * 2**39), (" 512MiB ", 2**29)]
)
def test_sizes(text, size):
    assert read_bytes("device_memory", text) == size


@pytest.mark.parametrize(
    "text", ["80", "80G", "GiB", "-3GiB", "0GiB", "eighty GiB", "80 KiBs", "4KB", "9" * 400 + "GiB", "2000000TiB"]
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="^device_memory=.* is no size of memory; write"):
        read_bytes("device_memory", text)


def test_a_size_has_the_unit_that_suits_it():
    sizes = (0, 512, 2**10, 1.5 * 2**20, 2**30 - 2**20, 2**30, 123.45 * 2**30)
    texts = ("0.00 KiB", "0.50 KiB", "1.00 KiB", "1.50 MiB", "1,023.0 MiB", "1.00 GiB", "123.5 GiB")
    assert tuple(size_text(size) for size in sizes) == texts


def test_a_tables_unit_is_that_of_its_largest_size():
    assert suitable_unit(3 * 2**20).count(2**18) == "0.25" and suitable_unit(3 * 2**30).name == "GiB"
