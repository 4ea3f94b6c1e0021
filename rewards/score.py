"""`Score`: a reward with notes, from a function that judges one completion at a time.

Source: the value and the reasons for it travel together in several evaluation libraries; numeric notes become metrics
of the run (averaged), text notes columns beside the completion.

>>> Score(0.5, num_steps=3, verdict="half right")
Score(0.5, num_steps=3, verdict='half right')
"""

from __future__ import annotations

from typing import Any


class Score:
    """`value` (a number, or None where the reward does not apply) and notes by name.

    Raises:
        TypeError: a note is neither a number, text nor None.

    >>> Score(1.0, steps=3).notes
    {'steps': 3}
    >>> Score(1.0) == Score(1.0, steps=3)
    False
    """

    __slots__ = ("notes", "value")

    def __init__(self, value: Any, /, **notes: float | str | None) -> None:
        for name, note in notes.items():
            if note is not None and not isinstance(note, str) and not hasattr(type(note), "__float__"):
                raise TypeError(f"note {name!r} is {type(note).__name__} (want a number or text)")
        self.value = value
        self.notes = notes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Score) and (self.value, self.notes) == (other.value, other.notes)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Score({', '.join([repr(self.value), *(f'{name}={note!r}' for name, note in self.notes.items())])})"
