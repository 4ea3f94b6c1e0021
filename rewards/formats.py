"""Format rewards: whether a completion has the shape that was asked for, whatever it says.

    strict   1 if the text is <a>…</a> <b>…</b> … and nothing else, each tag once, else 0
    partial  tags that stand once and in order / tags that were asked for

Every one takes `prefill`, what the chat template has put in front of the completion: a template that opens `<think>`
itself makes a strict format reward 0 for ever unless it is scored with it.
Left out: nested tags and attributes.
"""

from __future__ import annotations

from collections.abc import Sequence


def strict_tags(completion: str, prefill: str = "", *, tags: Sequence[str] = ("think", "answer")) -> float:
    r"""1.0 for exactly one `<tag>…</tag>` of each of `tags`, in order, with only white space around them, else 0.0.

    Line breaks are allowed everywhere; the content of the last tag is not empty.

    >>> strict_tags("<plan>a\nb</plan>\n<code>c</code>", tags=("plan", "code"))
    1.0
    >>> strict_tags("<plan>a</plan> so <code>c</code>", tags=("plan", "code"))
    0.0
    """
    rest = (prefill + completion).strip()
    if not tags or any(rest.count(mark) != 1 for mark in _marks(tags)):
        return 0.0
    content = ""
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if not rest.startswith(opening) or closing not in rest:
            return 0.0
        content, _, rest = rest.removeprefix(opening).partition(closing)
        rest = rest.lstrip()
    return float(not rest and bool(content.strip()))


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
    return strict_tags(completion, prefill)


def think_format(completion: str, prefill: str = "") -> float:
    r"""1.0 for `<think>…</think>` and then an answer that is not empty; each tag stands once.

    >>> think_format("<think>hm</think>72"), think_format("<think>hm</think>"), think_format("72")
    (1.0, 0.0, 0.0)
    >>> think_format("hm</think>72"), think_format("hm</think>72", prefill="<think>\n")
    (0.0, 1.0)
    """
    text = (prefill + completion).strip()
    if not text.startswith("<think>") or any(text.count(mark) != 1 for mark in _marks(["think"])):
        return 0.0
    return float(bool(text.partition("</think>")[2].strip()))


def partial_tags(completion: str, prefill: str = "", *, tags: Sequence[str] = ("think", "answer")) -> float:
    r"""The share of the opening and closing `tags` that stand once each, and in order.

    A tag that stands twice earns nothing, nor does one in front of a tag that should precede it. What stands between
    the tags is not looked at: it is a slope towards `strict_tags`, to be given less weight, or to be scheduled away.
    Source: the tag-count rewards of public replications of DeepSeek-R1, with the order added.

    >>> partial_tags("<think>hm</think> 72"), partial_tags("<think>hm</think><answer>72</answer>")
    (0.5, 1.0)
    >>> partial_tags("</answer><answer></think><think>"), partial_tags("<think>" * 9)
    (0.25, 0.0)
    """
    text = prefill + completion
    marks = _marks(tags)
    reached, found = -1, 0
    for mark in marks:
        if text.count(mark) == 1 and (place := text.index(mark)) > reached:
            reached, found = place, found + 1
    return found / len(marks) if marks else 0.0


def _marks(tags: Sequence[str]) -> list[str]:
    return [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
