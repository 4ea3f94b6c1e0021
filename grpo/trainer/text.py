"""Numbers and foreign text as a person reads them, in a terminal and on the report page alike.

Nothing here raises for an odd value: a number that is missing is –, and text from models and datasets is made safe
to show by `visible` (terminal) or `escaped` (HTML).
Left out: terminal styles (console.py), and locales: a run reads the same everywhere.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from typing import Any

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_CELLS = 20
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_CONTROLS |= {code: 0xFFFD for code in (*range(0x80, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A))}


def visible(text: object) -> str:
    """`text` with its control characters (all but tab and newline) as symbols: an ESC becomes ␛, never an action."""
    return str(text).translate(_CONTROLS)


def escaped(value: object) -> str:
    """`visible` text for an HTML page: markup in it is shown, never read."""
    return html.escape(visible(value))


def as_float(value: Any) -> float:
    """`value` as a float; NaN for None, text and anything else that is not a number."""
    if value is None or isinstance(value, str | bytes | bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
        return math.nan


def number(value: Any, digits: int = 3) -> str:
    """`digits` significant digits for a person: 0.812, 1024, 12.3k, 1e-5; a missing number is –."""
    x = as_float(value) + 0.0  # no -0
    if not math.isfinite(x):
        return "–" if math.isnan(x) else f"{x:+.0f}"
    for start, unit, suffix in ((9.995e11, 1e12, "T"), (9.995e8, 1e9, "G"), (9.995e5, 1e6, "M"), (9999.5, 1e3, "k")):
        if abs(x) >= start:
            return f"{x / unit:.{digits}g}{suffix}"
    if abs(x) >= 10**digits:
        return f"{x:.0f}"
    return f"{x:.{digits}g}".replace("e-0", "e-")


def percent(share: Any) -> str:
    """A share in 0..1 as percent, one decimal: 41.2 %."""
    x = as_float(share)
    return f"{100 * x:.1f} %" if math.isfinite(x) else "–"


def duration(seconds: Any) -> str:
    """Seconds as 41 s, 2 min 41 s, 3 h 5 min or 2 d 4 h."""
    x = as_float(seconds)
    if not math.isfinite(x):
        return "–"
    if 0 < x < 10:
        return f"{x:.1f} s"
    whole = round(x)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes == 0:
        return f"{whole} s"
    if hours == 0:
        return f"{minutes} min {whole % 60} s"
    return f"{hours} h {minutes % 60} min" if days == 0 else f"{days} d {hours % 24} h"


def sparkline(values: Sequence[float], cells: int = SPARK_CELLS) -> str:
    """Block characters for the means of at most `cells` equal parts of `values`; a part without a number is a space."""
    cells = min(cells, len(values))
    edges = [len(values) * i // cells for i in range(cells + 1)] if cells else [0]
    parts = [[v for v in values[a:b] if math.isfinite(v)] for a, b in itertools.pairwise(edges)]
    means = [sum(part) / len(part) if part else math.nan for part in parts]
    known = [mean for mean in means if math.isfinite(mean)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((m - low) * scale)] if math.isfinite(m) else " " for m in means)


def middle_out(text: str, limit: int) -> str:
    """`text` with its middle replaced by a count when longer than `limit`: the answer is mostly at the end."""
    if len(text) <= limit:
        return text
    head, tail = text[: limit // 2], text[len(text) - limit // 2 :]
    return f"{head}\n[… {len(text) - len(head) - len(tail):,} characters left out …]\n{tail}"


def counted(n: int, thing: str) -> str:
    """`n` with its noun: 1 step, 1,200 steps."""
    return f"{n:,} {thing}" + ("" if n == 1 else "s")
