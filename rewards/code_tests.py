"""Tests of a dataset → inputs that the judged process gets, and judgements that stay with the judge.

    {"input": "3 4", "output": "7"}                     program:  stdin → stdout
    {"function": "f", "args": [3, 4], "expected": 7}    function: arguments → value
    "assert f(3, 4) == 7"                               asserts:  the calls are sent, the rest is worked out here

Sources of the forms: APPS (arXiv 2105.09938: inputs, outputs, fn_name), MBPP (arXiv 2108.07732: a list of asserts),
HumanEval (arXiv 2107.03374: `def check(candidate)`). An assert is split: calls of the tested functions with plain
arguments run in the sandbox, and their values come back as plain data; comparison, arithmetic and built-in functions
around them are evaluated by a small whitelist here, so no object of the code's making takes part in its own judgement.
Left out: asserts in loops, with variables, comprehensions or exceptions. They are refused with a line, never guessed.
"""

from __future__ import annotations

import ast
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.sandbox.values import NotPlainError, encode

MAX_INTEGER_BITS = 100_000
_JUDGES: dict[str, Callable[..., Any]] = {
    "abs": abs, "all": all, "any": any, "bool": bool, "dict": dict, "float": float, "frozenset": frozenset, "int": int,
    "len": len, "list": list, "max": max, "min": min, "round": round, "set": set, "sorted": sorted, "str": str,
    "sum": sum, "tuple": tuple, "isclose": math.isclose, "math.isclose": math.isclose,
}  # fmt: skip
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
    ast.Mod: lambda one, other: _remainder(one, other),
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
}  # fmt: skip


def _remainder(one: Any, other: Any) -> Any:
    """For numbers alone: a width in a text that the code returned would fill the judge's memory."""
    if isinstance(one, str | bytes):
        raise TypeError("formatting is not worked out here")
    return one % other


_UNARY: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda one, other: one in other, ast.NotIn: lambda one, other: one not in other,
}  # fmt: skip


@dataclass(frozen=True)
class StdinTest:
    """A program's input and its whole output."""

    stdin: str
    expected: str


@dataclass(frozen=True)
class CallTest:
    """Calls to send, as `values` and `calls` write them, and what decides from their values whether all is well."""

    calls: tuple[Any, ...]
    passes: Callable[[Sequence[Any]], bool]


Test = StdinTest | CallTest


def read_tests(tests: Any, entry_point: str | None = None, abs_tol: float = 0.0) -> list[Test]:
    """The tests of one row. Raises ValueError that names what cannot be read; it is the data that is wrong then.

    Args:
        tests: a list of the forms above; or {"inputs": […], "outputs": […], "fn_name": … or none} (APPS); or source
            with asserts, alone or in `def check(candidate)`; or JSON text of one of these.
        entry_point: the function that `candidate` stands for, and that call tests without a name of their own call.
        abs_tol: numbers in values of function tests may differ by that much (not in asserts, which say it themselves).

    >>> [test.expected for test in read_tests('{"inputs": ["1", "2"], "outputs": ["1", "4"]}')]
    ['1', '4']
    >>> read_tests(["assert square(3) == 9"])[0].calls
    (['call', 'square', [['i', '0x3']], []],)
    """
    if isinstance(tests, str):
        tests = _from_text(tests)
    if isinstance(tests, Mapping):
        tests = _from_columns(tests) if "inputs" in tests else [tests]
    if isinstance(tests, str):
        found = _asserts(tests, entry_point)
    elif isinstance(tests, Sequence):
        found = [one for test in tests for one in _read(test, entry_point, abs_tol)]
    else:
        raise ValueError(f"tests are {type(tests).__name__} (want a list, a mapping with inputs and outputs, or text)")
    if not found:
        raise ValueError("there are no tests")
    return found


def _from_text(text: str) -> Any:
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"tests are no JSON ({error})") from error


def _from_columns(tests: Mapping[str, Any]) -> list[Any]:
    inputs, outputs, name = tests["inputs"], tests.get("outputs"), tests.get("fn_name")
    if not isinstance(outputs, Sequence) or len(inputs) != len(outputs):
        raise ValueError("tests: as many outputs as inputs are needed")
    if name is None:
        return [{"input": given, "output": wanted} for given, wanted in zip(inputs, outputs, strict=True)]
    return [{"function": name, "args": g, "expected": w} for g, w in zip(inputs, outputs, strict=True)]


def _read(test: Any, entry_point: str | None, abs_tol: float) -> list[Test]:
    if isinstance(test, str):
        return _asserts(test, entry_point)
    if not isinstance(test, Mapping):
        raise ValueError(f"a test is {type(test).__name__} (want text with asserts, or a mapping)")
    if "input" in test and "output" in test:
        if not isinstance(test["input"], str) or not isinstance(test["output"], str):
            raise ValueError("a test's input and output must be text")
        return [StdinTest(test["input"], test["output"])]
    if "args" not in test or "expected" not in test or not isinstance(test.get("function", entry_point), str):
        raise ValueError(f"a test has the keys {sorted(test)} (want input and output, or function, args and expected)")
    keywords = test.get("kwargs") or {}
    call = _call(test.get("function", entry_point), list(test["args"]), dict(keywords))
    expected = _untupled(test["expected"])
    return [CallTest((call,), lambda values: close(_untupled(values[0]), expected, abs_tol))]


def _call(name: Any, arguments: list[Any], keywords: dict[str, Any]) -> Any:
    try:
        return [
            "call",
            name,
            [encode(value) for value in arguments],
            [[key, encode(value)] for key, value in keywords.items()],
        ]
    except NotPlainError as error:
        raise ValueError(f"a test of {name}: {error}") from error


def _untupled(value: Any) -> Any:
    """Tuples as lists: tests from JSON know no tuples."""
    if isinstance(value, list | tuple):
        return [_untupled(element) for element in value]
    return {key: _untupled(element) for key, element in value.items()} if isinstance(value, dict) else value


def close(value: Any, expected: Any, abs_tol: float) -> bool:
    """Equal as Python has it, complete and of equal length; numbers up to `abs_tol` apart.

    >>> close([1, 2.0005], [1, 2], 0.001), close([1], [1, 2], 1.0), close(True, 1, 0.0), close("1", 1, 0.0)
    (True, False, True, False)
    """
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(
            close(one, other, abs_tol) for one, other in zip(value, expected, strict=True)
        )
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(close(value[key], expected[key], abs_tol) for key in expected)
    if value == expected:
        return True
    if not abs_tol or not isinstance(value, int | float) or not isinstance(expected, int | float):
        return False
    return math.isclose(value, expected, rel_tol=0.0, abs_tol=abs_tol)


# --- asserts -----------------------------------------------------------------------------------------------------


def _asserts(source: str, entry_point: str | None) -> list[Test]:
    try:
        body = ast.parse(source.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"tests are no Python ({error})") from error
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    candidate = None
    if functions:
        if len(functions) > 1 or len(functions[0].args.args) != 1 or entry_point is None:
            raise ValueError("tests with a function: want one, `def check(candidate)`, and a column entry_point")
        candidate = functions[0].args.args[0].arg
        body = [node for node in body if not _is_frame(node)] + functions[0].body
    names = {candidate: entry_point} if candidate and entry_point else {}
    return [_Assert(node.test, names).as_test() for node in body if _is_assert(node) and isinstance(node, ast.Assert)]


def _is_frame(node: ast.stmt) -> bool:
    """What stands around the asserts: the function itself, METADATA = {…}, check(f), imports of math."""
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return call or isinstance(node, ast.FunctionDef | ast.Assign | ast.Import | ast.ImportFrom)


def _is_assert(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if isinstance(node, ast.Pass | ast.Import | ast.ImportFrom):
        return False
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return False
    raise ValueError(f"line {node.lineno} of the tests cannot be judged from outside: {ast.unparse(node)[:60]}")


class _Assert:
    """One condition, split into calls for the sandbox and an expression over their values for the judge."""

    def __init__(self, condition: ast.expr, names: Mapping[str, str]) -> None:
        self.condition = condition
        self.names = names
        self.calls: list[Any] = []

    def as_test(self) -> Test:
        try:
            judge = self.expression(self.condition)
        except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"assert {ast.unparse(self.condition)[:60]}: {error}") from error
        if not self.calls:
            raise ValueError(f"assert {ast.unparse(self.condition)[:60]}: calls no tested function")
        return CallTest(tuple(self.calls), lambda values: _holds(judge, values))

    def expression(self, node: ast.expr) -> Callable[[Sequence[Any]], Any]:
        """A function of the calls' values. Raises ValueError for what the whitelist does not hold."""
        match node:
            case ast.Constant():
                return lambda values: node.value
            case ast.List() | ast.Tuple() | ast.Set():
                parts = [self.expression(element) for element in node.elts]
                make = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
                return lambda values: make(part(values) for part in parts)
            case ast.Dict():
                pairs = [
                    (self.expression(key), self.expression(value))
                    for key, value in zip(node.keys, node.values, strict=True)
                    if key is not None
                ]
                return lambda values: {key(values): value(values) for key, value in pairs}
            case ast.BinOp() | ast.UnaryOp() | ast.BoolOp() | ast.Compare() | ast.Subscript():
                return self.operation(node)
            case ast.Call():
                return self.call(node)
        raise ValueError(f"{ast.unparse(node)[:60]} cannot be judged from outside")

    def operation(self, node: Any) -> Callable[[Sequence[Any]], Any]:
        """Operators, comparisons, and, or, a place in a value."""
        match node:
            case ast.UnaryOp() if type(node.op) in _UNARY:
                operand, unary = self.expression(node.operand), _UNARY[type(node.op)]
                return lambda values: unary(operand(values))
            case ast.BinOp() if type(node.op) in (ast.Mult, ast.Pow):
                if any(isinstance(inner, ast.Call) for inner in ast.walk(node)):
                    raise ValueError("products and powers of what the code returns are not worked out here")
                constant = _product(node)
                return lambda values: constant
            case ast.BinOp() if type(node.op) in _BINARY:
                left, right, binary = self.expression(node.left), self.expression(node.right), _BINARY[type(node.op)]
                return lambda values: binary(left(values), right(values))
            case ast.BoolOp():
                parts, both = [self.expression(value) for value in node.values], isinstance(node.op, ast.And)
                return lambda values: (all if both else any)(part(values) for part in parts)
            case ast.Compare():
                return self.comparison(node)
            case ast.Subscript() if not isinstance(node.slice, ast.Slice):
                whole, place = self.expression(node.value), self.expression(node.slice)
                return lambda values: whole(values)[place(values)]
        raise ValueError(f"{ast.unparse(node)[:60]} cannot be judged from outside")

    def comparison(self, node: ast.Compare) -> Callable[[Sequence[Any]], Any]:
        """a < b <= c, as Python chains it."""
        parts = [self.expression(part) for part in (node.left, *node.comparators)]
        operators = [_COMPARE[type(op)] for op in node.ops]

        def compare(values: Sequence[Any]) -> bool:
            found = [part(values) for part in parts]
            return all(op(found[place], found[place + 1]) for place, op in enumerate(operators))

        return compare

    def call(self, node: ast.Call) -> Callable[[Sequence[Any]], Any]:
        """A built-in function, worked out here; or a tested one, whose value will come from the sandbox."""
        name = ast.unparse(node.func)
        if name in _JUDGES:
            arguments = [self.expression(argument) for argument in node.args]
            keywords = {str(keyword.arg): self.expression(keyword.value) for keyword in node.keywords}
            return lambda values: _JUDGES[name](
                *[argument(values) for argument in arguments],
                **{key: value(values) for key, value in keywords.items()},
            )
        place = len(self.calls)
        self.calls.append(self.sent(node))
        return lambda values: values[place]

    def sent(self, node: ast.Call) -> Any:
        """["call", name, arguments, keywords]; an argument is plain, or a call of a tested function again."""
        if not isinstance(node.func, ast.Name):
            raise ValueError(f"{ast.unparse(node)[:60]} is no call of a function by its name")
        name = self.names.get(node.func.id, node.func.id)
        keywords = [[str(keyword.arg), self.argument(keyword.value)] for keyword in node.keywords if keyword.arg]
        if len(keywords) != len(node.keywords):
            raise ValueError(f"{ast.unparse(node)[:60]}: ** is not understood")
        return ["call", name, [self.argument(argument) for argument in node.args], keywords]

    def argument(self, node: ast.expr) -> Any:
        """An argument as it is sent."""
        if isinstance(node, ast.Call) and ast.unparse(node.func) not in _JUDGES:
            return self.sent(node)
        inner = _Assert(node, self.names)
        judge = inner.expression(node)
        if inner.calls:
            raise ValueError(f"{ast.unparse(node)[:60]} mixes plain values and calls")
        return encode(judge([]))


def _holds(judge: Callable[[Sequence[Any]], Any], values: Sequence[Any]) -> bool:
    """The condition's truth; a value of a kind that it cannot be asked of is wrong."""
    try:
        return bool(judge(values))
    except (TypeError, ValueError, ArithmeticError, LookupError):
        return False


def _product(node: ast.expr) -> Any:
    """A product or power of constants in a test, small enough to be worked out at once."""
    if isinstance(node, ast.BinOp):
        left, right = _product(node.left), _product(node.right)
        if isinstance(node.op, ast.Pow):
            if abs(right) * max(1, int(abs(left)).bit_length()) > MAX_INTEGER_BITS:
                raise ValueError("a power too large to be worked out")
            return left**right
        if not isinstance(node.op, ast.Mult):
            return _BINARY[type(node.op)](left, right)
        sizes = [len(side) for side in (left, right) if isinstance(side, str | bytes | list | tuple)]
        if sizes and sizes[0] * max(side for side in (left, right) if isinstance(side, int)) > MAX_INTEGER_BITS:
            raise ValueError("a repetition too long to be worked out")
        return left * right
    return _Assert(node, {}).expression(node)([])
