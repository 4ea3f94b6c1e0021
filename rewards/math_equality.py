r"""Math equality: whether two expressions are the same number, set, interval, equation or formula.

Two plain numbers are compared here, exactly, as Fractions and with the task's own tolerance. Everything else is asked
of math-verify (which parses LaTeX to sympy) inside a worker process that is killed when it does not answer in time: its
own timeout is an alarm signal, which fails off the main thread and costs seconds. Nothing of model text is evaluated in
this process, and power towers, large exponents and factorials of large numbers are refused before anybody is asked.

What math-verify does, and is kept: units are ignored (5 cm is 5), sets and lists are equal, a formula and a decimal
are equal when six digits agree. What is decided here: percent has the one reading of the task; gold goes first and the
other order is tried for inequalities only (x > 3 and (3, ∞)); alternatives, digits side by side and, where a number is
asked for, sums and products of numbers (the question handed back) are no answer.
Needs the package math-verify. Left out: text answers (compared letter by letter).
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any, Literal

from rewards.extract import after_think, all_boxed, answer_part, hash_answer, last_number, plain_digits, readable
from rewards.scorers import Percent, parse_number

MAX_TEXT = 50_000
"""Characters that are compared at all."""
MAX_EXPRESSION = 1_000
"""Characters that math-verify is asked about."""
MAX_EXPONENT_DIGITS = 4

_SYMBOLS = {"∞": r"\infty ", "π": r"\pi ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "×": r"\times ", "·": r"\cdot "}
_SYMBOLS |= {"÷": r"\div ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "√": r"\sqrt ", "°": r"^\circ "}
_SYMBOL_TABLE = str.maketrans(_SYMBOLS)
_TOKEN = re.compile(r"\^|\*\*|[{(\[]|[})\]]|\\[A-Za-z]+|\\.|\d+|\S")
_SIZING = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])|\s")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_LARGE_EXPONENT = re.compile(rf"(?:\^|\*\*)\s?[{{(]?\s?[-+]?\d{{{MAX_EXPONENT_DIGITS + 1}}}")
_SMALL_FACTORIAL = re.compile(r"(?<![\d.^])\d{1,2}!(?!!)|(?<![A-Za-z^])[a-z]!(?!!)")
_SPACE = r"(?:\s|~|\\[ ,;:!]|\\q?quad|\{\}|\\text\{\s?\})"
_APART = re.compile(rf"\d{_SPACE}{{1,8}}\d|\d\{{{{1,2}}\d|(?<![A-Za-z\]}}])\{{\d+\}}{_SPACE}{{0,2}}\{{?\d")
_CALCULATION = re.compile(r"\d[ )}]{0,3}(?:[-+*]|\\(?:times|cdot|div)(?![A-Za-z]))[ ({]{0,3}\d")
_OR = re.compile(r"\bor\b|\\lor\b|\\vee\b")
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|leq|geq|lt|gt|leqslant|geqslant)(?![A-Za-z])")
_NAME = re.compile(r"\s?\\?[A-Za-z]{1,12}(?:_\{?\w{1,8}\}?)?(?:\(\w{1,8}\))?\s?")
_PERCENT = re.compile(r"\\?%\s?$")


def math_equal(
    gold: str,
    prediction: str,
    *,
    abs_tol: float = 0.0,
    rel_tol: float = 0.0,
    percent: Percent = "ratio",
    timeout: float = 1.0,
) -> bool:
    r"""Whether `prediction` is what `gold` is; gold first, they are not alike.

    Args:
        gold: the right answer, LaTeX or plain.
        prediction: the answer alone, as an extractor found it.
        abs_tol, rel_tol: for two plain numbers: |x − gold| ≤ max(abs_tol, rel_tol · |gold|), computed exactly.
        percent: what the task means by 50%: "ratio" 1/2, "points" 50.
        timeout: seconds that the worker has.

    Raises:
        ImportError: math-verify is asked and not installed.
        rewards.worker.WorkerFault: the worker had no answer in time, or died: a fault, and no verdict.

    >>> math_equal(r"\frac{1}{2}", "0.5"), math_equal("1/3", "0.333333"), math_equal("1/3", "0.333", rel_tol=0.01)
    (True, False, True)
    >>> math_equal("50%", "0.5"), math_equal("50", "50%"), math_equal("50", "50%", percent="points")
    (True, False, True)
    """
    if max(len(gold), len(prediction)) > MAX_TEXT or not (readable(gold) and readable(prediction)):
        return False
    gold, prediction = _plain(gold), _plain(prediction)
    if gold == prediction:
        return bool(gold)
    pair = _unnamed(gold, prediction) if gold and prediction else None
    if pair is None:
        return False
    numbers = [parse_number(text, percent) for text in pair]
    if numbers[0] is not None and numbers[1] is not None:
        tolerance = max(Fraction(abs_tol), Fraction(rel_tol) * abs(numbers[0]))
        return abs(numbers[1] - numbers[0]) <= tolerance
    read = [_percent_read(text, percent) for text in pair]
    return not _is_no_answer(*pair) and _asked(read[0], read[1], timeout)


def _asked(gold: str, prediction: str, timeout: float) -> bool:
    if any(refusal(text) is not None for text in (gold, prediction)):
        return False
    if _ask(gold, prediction, timeout):
        return True
    compares = [_INEQUALITY.search(text) is not None for text in (gold, prediction)]
    return any(compares) and _ask(prediction, gold, timeout)


def _ask(gold: str, prediction: str, timeout: float) -> bool:
    return bool(_pool(timeout).call([gold, prediction]))


@lru_cache(maxsize=4)
def _pool(timeout: float) -> Any:
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("math equality needs the package math-verify (pip install math-verify)")
    from rewards.worker import Pool  # a process is started only when one is needed

    return Pool("rewards.math_equality:check", timeout=timeout, size=1)


def check(gold: str, prediction: str) -> bool:
    r"""math-verify's verdict on two expressions without delimiters; runs in the worker, which ends it when it hangs.

    Raises:
        ImportError: math-verify is not installed.

    >>> check(r"\sqrt{4}", "2")  # doctest: +SKIP
    True
    """
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    read = [
        parse(rf"\boxed{{{text}}}", extraction_config=config, fallback_mode="no_fallback", parsing_timeout=None)
        for text in (gold, prediction)
    ]
    return bool(read[0] and read[1] and verify(read[0], read[1], timeout_seconds=None))


# --- before anybody is asked ----------------------------------------------------------------------------------


def refusal(expression: str) -> str | None:
    r"""Why `expression` is not computed with, or None. A cheap first sieve: what it lets through may still be killed.

    >>> refusal("9^{9^{9^9}}"), refusal("9^9^9"), refusal("(9^9)^9"), refusal("10^8!")
    ('nested powers', 'nested powers', 'nested powers', 'factorial')
    >>> [refusal(text) for text in ("e^{x^2}", "(x^2 + 1)^2", "5!", r"\frac{n!}{2}", "2^{10}")]
    [None, None, None, None, None]
    """
    if len(expression) > MAX_EXPRESSION:
        return "too long"
    if all_boxed(expression) or not _is_balanced(expression):
        return "braces"
    depth = _exponent_depth(expression)
    has_letters = any(letter.isalpha() for letter in _COMMAND.sub("", expression))
    if depth > 2 or (depth == 2 and not has_letters):
        return "nested powers"
    if _LARGE_EXPONENT.search(expression) is not None:
        return "large exponent"
    return "factorial" if "!" in _SMALL_FACTORIAL.sub("", expression.replace(r"\!", "")) else None


def _exponent_depth(expression: str) -> int:
    """How many powers are taken of one another: 1 in x^{2}, 2 in 2^{3^4}, 2^3^4 and (2^3)^4."""
    frames = [[0, 0]]  # per open bracket: powers around it, powers inside it so far
    pending = chain = 0  # what the operand after a ^ is the power of; powers in the operand that has just ended
    for token in _TOKEN.findall(_SIZING.sub("", expression)):
        if token in ("^", "**"):
            pending, chain = max(frames[-1][0], chain) + 1, 0
            frames[-1][1] = max(frames[-1][1], pending)
        elif token in "{([":
            frames.append([pending or frames[-1][0], 0])
            pending = chain = 0
        elif token in "})]":
            chain = max(frames.pop()) if len(frames) > 1 else 0
            frames[-1][1] = max(frames[-1][1], chain)
        elif token not in "+-":
            pending, chain = 0, pending
    return max(inside for _, inside in frames)


def _is_balanced(expression: str) -> bool:
    """Whether no brace could end the box that math-verify gets the expression in."""
    depth = 0
    for token in re.findall(r"\\.|[{}]|\\$", expression, re.DOTALL):
        if token == "\\":
            return False
        depth += (token == "{") - (token == "}")
        if depth < 0:
            return False
    return depth == 0


def _is_no_answer(gold: str, prediction: str) -> bool:
    """Whether `prediction` has alternatives, digits side by side (math-verify adds them up) or an open calculation."""
    patterns = [_OR, _APART] if parse_number(gold) is None else [_OR, _APART, _CALCULATION]
    return any(pattern.search(prediction) and not pattern.search(gold) for pattern in patterns)


def _plain(text: str) -> str:
    """`text` in NFC with ASCII digits and signs, LaTeX symbols, and without math delimiters around it."""
    text = plain_digits(unicodedata.normalize("NFC", text)).translate(_SYMBOL_TABLE).strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(opening) : -len(closing)]
        if (
            len(text) > 2 * len(opening)
            and text.startswith(opening)
            and text.endswith(closing)
            and opening not in inner
        ):
            text = inner.strip()
    return text.removesuffix(".").rstrip()


def _unnamed(gold: str, prediction: str) -> tuple[str, str] | None:
    """Both without `x =` where only one has it. None: an equation where none is asked for (`1 = 2 = 72`)."""
    num_gold, num_given = _num_equations(gold), _num_equations(prediction)
    if num_given > num_gold:
        value = _value_of_name(prediction) if num_given == 1 else None
        return None if value is None else (gold, value)
    value = _value_of_name(gold) if num_gold == 1 and num_given == 0 else None
    return gold if value is None else value, prediction


def _value_of_name(equation: str) -> str | None:
    name, _, value = equation.partition("=")
    return value.strip() if _NAME.fullmatch(name) else None


def _num_equations(text: str) -> int:
    return len(re.findall(r"(?<![<>!\\])=", text))


def _percent_read(text: str, percent: Percent) -> str:
    body, num = _PERCENT.subn("", text)
    return text if not num else rf"\frac{{{body}}}{{100}}" if percent == "ratio" else body


# --- the reward -----------------------------------------------------------------------------------------------


def math_verify_accuracy(
    completion: str,
    answer: Any,
    *,
    abs_tol: float = 0.0,
    rel_tol: float = 0.0,
    percent: Percent = "ratio",
    timeout: float = 1.0,
    on_timeout: Literal["raise", "wrong"] = "raise",
    log_metric: Callable[[str, float], None] | None = None,
) -> float | None:
    r"""1.0 when the completion's one answer is equal to `answer`, else 0.0; None where the row has no answer.

    Args:
        completion: text of one completion; `find_expression` says where its answer stands.
        answer: the right answer, or a worked solution that ends in a box or in `####`.
        abs_tol, rel_tol, percent, timeout: see `math_equal`.
        on_timeout: "raise": no verdict in time is a fault, which the trainer counts. "wrong": 0.0, because the text
            of the answer is what took so long; then a machine that is slow today trains the policy, too.
        log_metric: given by the trainer; logs `timeout` under "wrong".

    >>> math_verify_accuracy(r"<think>hm</think> It is \boxed{\frac{1}{2}}.", "0.5")
    1.0
    >>> math_verify_accuracy("1/2 or 2/3", "0.5"), math_verify_accuracy("1/2", None)
    (0.0, None)
    """
    gold = _gold(answer)
    if gold is None:
        return None
    found = find_expression(completion, gold) if readable(completion) else None
    if found is None:
        return 0.0
    verdict = partial(math_equal, gold, found, abs_tol=abs_tol, rel_tol=rel_tol, percent=percent, timeout=timeout)
    if on_timeout == "raise":
        return float(verdict())
    from rewards.worker import WorkerTimeout

    try:
        return float(verdict())
    except WorkerTimeout:
        if log_metric is not None:
            log_metric("timeout", 1.0)
        return 0.0


def find_expression(text: str, gold: str = "") -> str | None:
    r"""The one answer of a completion, as written: the box, else the `####` line, else all of `<answer>`.

    Where none of these is there, the last number, if `gold` is one. One answer or none: after `</think>` or in
    `<answer>`, boxes that differ are no answer; elsewhere the last box counts.

    >>> find_expression(r"so \boxed{x + 1}"), find_expression("</think><answer> x + 1 </answer>")
    ('x + 1', 'x + 1')
    >>> find_expression(r"</think> \boxed{1} or \boxed{2}"), find_expression("It makes 72.", "72")
    (None, '72')
    """
    region, delimited = answer_part(text)
    boxes = all_boxed(region)
    if boxes:
        marked = boxes[-1] if not delimited or len(set(boxes)) == 1 else None
        return None if "####" in region and not _same(marked, hash_answer(region)) else marked
    if "####" in region:
        return hash_answer(region)
    if "<answer>" in (after_think(text) or ""):
        return region.strip() or None
    return last_number(region) if parse_number(gold) is not None else None


def _same(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return False
    return one == other or (parse_number(one) is not None and parse_number(one) == parse_number(other))


def _gold(answer: Any) -> str | None:
    """What an answer column says: its last box, else what follows its last `####`, else all of it."""
    text = "" if answer is None else str(answer)
    boxes = all_boxed(text)
    return (boxes[-1] if boxes else text.rpartition("####")[2].strip()) or None
