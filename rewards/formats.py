"""Format rewards: whether a completion has the shape that was asked for, whatever it says.

Left out: partial credit per tag (later).
"""

from __future__ import annotations


def think_answer_format(completion: str, prefill: str = "") -> float:
    r"""1.0 for exactly `<think>…</think>` and then `<answer>…</answer>`, with only white space around them.

    Line breaks are allowed everywhere; each tag stands once, and the answer is not empty. Source: the format reward of
    DeepSeek-R1 (arXiv 2501.12948); the widely copied `^<think>.*?</think><answer>.*?</answer>$` without DOTALL
    rejects every answer of more than one line.

    Args:
        completion: text of one completion.
        prefill: what the chat template has put in front of it. With a template that opens `<think>` itself, bind it:
            `functools.partial(think_answer_format, prefill="<think>\n")`.

    >>> think_answer_format("<think>\nhm\n</think>\n\n<answer>\n72\n</answer>\n")
    1.0
    >>> think_answer_format("hm</think><answer>72</answer>")
    0.0
    >>> think_answer_format("hm</think><answer>72</answer>", prefill="<think>\n")
    1.0
    """
    text = (prefill + completion).strip()
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    if any(text.count(tag) != 1 for tag in tags):
        return 0.0
    places = [text.index(tag) for tag in tags]
    between = text[places[1] + len("</think>") : places[2]]
    answer = text[places[2] + len("<answer>") : places[3]]
    whole = places == sorted(places) and text.startswith("<think>") and text.endswith("</answer>")
    return float(whole and not between.strip() and bool(answer.strip()))
