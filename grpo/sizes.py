"""Amounts of memory as people write them: "24GB", "512 MiB", 1.5e9.

GB, MB and KB are powers of ten, as cards are sold; GiB, MiB and KiB powers of two, as tools report.
"""

from __future__ import annotations

import math
import re

GIB = 2**30
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_FORM = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int | float) -> int:
    """Bytes of "24GB", "22.5 GiB", "512mib" or a plain number of bytes.

    Raises:
        ValueError: anything else, or nothing above 0: "want a size like 24GB or 512MiB".
    """
    match = _FORM.fullmatch(str(text)) if not isinstance(text, bool) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    size = float(match[1]) * unit if match and unit else 0.0
    if not (math.isfinite(size) and size >= 1):
        raise ValueError(f"{text!r} is no size of memory (want one like 24GB or 512MiB)")
    return int(size)


def parse_card(text: str | int | float) -> int:
    """Bytes of a GPU's memory, `parse_bytes` and at least 1 MiB: a bare "24" is no card.

    Raises:
        ValueError: less, or no size at all.
    """
    size = parse_bytes(text)
    if size < 2**20:
        raise ValueError(f"{text!r} is a card of {size:,} bytes (want one like 24GB)")
    return size


def format_bytes(count: float) -> str:
    """GiB with two places from 0.1 GiB on, else MiB: "18.60 GiB", "24 MiB"."""
    return f"{count / GIB:.2f} GiB" if abs(count) >= 0.1 * GIB else f"{count / 2**20:.0f} MiB"
