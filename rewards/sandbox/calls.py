"""What a function test asks the judged process to evaluate: a call with plain arguments, or calls inside calls.

Runs beside the code under test: in the child of the supervisor, or inside the program that goes to a remote service
(from the line below on, after the text of `values.py`). Left out: anything but calls; the judge does the rest.
"""

from __future__ import annotations

from values import decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# ---


def evaluate(node: Any, names: dict[str, Any]) -> Any:
    """A value as `values` writes it, or ["call", function, [arguments], [[keyword, argument]…]]."""
    if type(node) is list and node[0] == "call":
        _, name, arguments, keywords = node
        function = names[name] if name in names else getattr(names["Solution"](), name)
        return function(
            *[evaluate(argument, names) for argument in arguments],
            **{keyword: evaluate(argument, names) for keyword, argument in keywords},
        )
    return decode(node)
