r"""The one final answer of a completion as text, for tasks whose answers are no numbers.

Source: the answer formats of R1 (arXiv 2501.12948) and MATH (arXiv 2103.03874).
Left out: numbers in running text (`rewards.find_answer` has them).
"""

from __future__ import annotations

from rewards.extract import after_think, all_boxed, hash_answer, readable, xml_tag


def final_answer(completion: str) -> str | None:
    r"""What is in `<answer>`, in the boxes (which must agree), after `####`, else all that follows the reasoning.

    >>> final_answer("<think>1</think> abc "), final_answer(r"\boxed{abc}"), final_answer("so\n#### abc")
    ('abc', 'abc', 'abc')
    >>> final_answer(r"\boxed{a} or \boxed{b}"), final_answer("<answer>a</answer><answer>b</answer>")
    (None, None)
    """
    region = after_think(completion) if readable(completion) else None
    if region is None:
        return None
    if "<answer>" in region or "</answer>" in region:
        region = xml_tag(region, "answer") or ""
    boxes = set(all_boxed(region))
    if boxes:
        return boxes.pop() if len(boxes) == 1 else None
    return hash_answer(region) if "####" in region else region.strip() or None
