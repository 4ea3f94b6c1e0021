"""Sizes of memory, as written and as shown."""

import pytest

from grpo.sizes import format_bytes, parse_bytes, parse_card


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("24GB", 24 * 10**9), ("24 gb", 24 * 10**9), ("1.5GiB", 3 * 2**29), ("512MiB", 512 * 2**20), ("7", 7),
        (1024, 1024), (2e9, 2 * 10**9), ("2e9", 2 * 10**9), ("3.KB", 3000),
    ],
)  # fmt: skip
def test_sizes_are_read(text, wanted):
    assert parse_bytes(text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "24 XB", "-1GB", "0", "nan", "inf", True, "1e999GB", "24GB!", "0.1"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="want one like 24GB"):
        parse_bytes(text)


def test_a_card_is_at_least_a_mebibyte():
    assert parse_card("24GB") == 24 * 10**9
    with pytest.raises(ValueError, match=r"'24' is a card of 24 bytes \(want one like 24GB\)"):
        parse_card("24")
    with pytest.raises(ValueError, match="is no size of memory"):
        parse_card("lots")


def test_sizes_are_shown():
    assert (format_bytes(18.6 * 2**30), format_bytes(24 * 2**20), format_bytes(-(2**30))) == (
        "18.60 GiB",
        "24 MiB",
        "-1.00 GiB",
    )
