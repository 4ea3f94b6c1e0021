"""The code reward: forms of tests, what is sent, what counts as equal, and that the same completion scores the same."""

import pickle

import pytest

from rewards.code import CodeTests, code_of, code_tests, same_output
from rewards.code_tests import read_tests
from rewards.sandbox import Limits, SandboxError

PROCESS = CodeTests("process", limits=Limits(timeout_s=2.0))


def fenced(source):
    return f"<think>hm</think>\n```python\n{source}\n```\n"


ADD = "def add(a, b=0): return a + b"


@pytest.mark.parametrize(
    ("source", "tests", "entry_point", "expected"),
    [
        ("print(int(input()) ** 2)", {"inputs": ["2", "3"], "outputs": ["4\n", "9"]}, None, 1.0),
        ("print(4)", {"inputs": ["2", "3"], "outputs": ["4\n", "9"]}, None, 0.5),
        (ADD, {"inputs": [[1, 2], [3, 4]], "outputs": [3, 8], "fn_name": "add"}, None, 0.5),
        (ADD, '[{"args": [1, 2], "expected": 3}]', "add", 1.0),
        (ADD, [{"function": "add", "args": [1], "kwargs": {"b": 5}, "expected": 6}], None, 1.0),
        ("def f(x): return (x, [x])", [{"function": "f", "args": [1], "expected": [1, [1]]}], None, 1.0),
        ("def f(x): return [3]", [{"function": "f", "args": [1], "expected": [3, 7, 9]}], None, 0.0),
        ("class Solution:\n    def f(self, x): return -x", [{"function": "f", "args": [1], "expected": -1}], None, 1.0),
        (ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "assert add([1], [2]) == [1, 2]"], None, 2 / 3),
        (ADD, "assert add(1, 2) == 3\nassert abs(add(0.1, 0.2) - 0.3) < 1e-6 and not add(0) and add(1) is not None", None, 1.0),
        (ADD, "assert add(add(1, 2), 3) == 6\nassert sorted(add([2], [1])) == [1, 2]\nassert add(1) in (1, 2)", None, 1.0),
        (ADD, "METADATA = {}\ndef check(candidate):\n    'x'\n    assert candidate(2, 2) == 2 ** 2\n    assert 3 < candidate(4) <= 5\n", "add", 1.0),
        ("def f(x): return 'abc'", ["assert abs(f(1)) == 1", "assert f(1)[1] == 'b'"], None, 0.5),
        ("def f(x): return '%999999999d'", ["assert f(1) % 2 == 0"], None, 0.0),
        ("n = 0\ndef f():\n    global n\n    n += 1\n    return n", ["assert f() == 1", "assert f() == 1"], None, 1.0),
    ],
)  # fmt: skip
def test_scores(source, tests, entry_point, expected):
    assert PROCESS(fenced(source), tests, entry_point) == pytest.approx(expected)


def test_all_or_nothing_and_limits_of_tests():
    tests = {"inputs": ["1", "2", "3"], "outputs": ["1", "2", "4"]}
    assert CodeTests("process", mode="all")(fenced("print(input())"), tests) == 0.0
    assert CodeTests("process", mode="all", max_tests=2, num_visible=2)(fenced("print(input())"), tests) == 1.0


def orders(row, **options):
    """The inputs of a row's tests in the order in which they run."""
    return [test.stdin for test in CodeTests("process", **options)._ordered(read_tests(row), row)]


def test_hidden_tests_run_in_an_order_of_the_row():
    rows = [{"inputs": [f"{n}" for n in range(8)], "outputs": [f"{row}"] * 8} for row in range(20)]
    written = rows[0]["inputs"]
    found = [orders(row) for row in rows]
    assert all(sorted(order) == written for order in found)
    assert sum(order == written for order in found) <= 1 and len({tuple(order) for order in found}) >= 18
    assert found == [orders(row) for row in rows]  # the same for every completion
    shown = [orders(row, num_visible=3) for row in rows]
    assert all(order[:3] == written[:3] for order in shown) and len({tuple(order) for order in shown}) >= 15
    assert all(len(orders(row, num_visible=3, max_tests=5)) == 5 for row in rows)
    # the first tests are not the ones that max_tests keeps
    kept = [orders(row, max_tests=2) for row in rows]
    assert len({test for order in kept for test in order}) == 8


@pytest.mark.parametrize(
    ("source", "visible_only"),
    [("print(1)", 1.0), ("print(input())", 0.0), ("print(2)", 0.0)],  # knows the visible test; right; wrong
)
@pytest.mark.parametrize("mode", ["fraction", "all"])
def test_what_passes_only_the_visible_tests_is_logged(source, visible_only, mode):
    logged = {}
    tests = {"inputs": ["1", "2", "3"], "outputs": ["1", "2", "3"]}
    CodeTests("process", mode=mode, num_visible=1)(fenced(source), tests, log_metric=logged.__setitem__)
    assert logged["visible_only"] == visible_only


def test_limits_as_a_configuration_has_them():
    assert code_tests("process", limits={"timeout_s": 0.5}).limits == Limits(timeout_s=0.5)
    with pytest.raises(TypeError, match="timeout"):
        code_tests("process", limits={"timeout": 0.5})
    with pytest.raises(ValueError, match="num_visible is -1"):
        code_tests("process", num_visible=-1)


def test_the_same_completion_scores_the_same():
    source = "print(*{str(n) for n in range(50)})\nprint(hash('a'))"
    outputs = set()
    for _ in range(3):
        from rewards.sandbox import Request, open_sandbox

        with open_sandbox("process", source) as box:
            outputs.add(box.run(Request()).stdout)
    assert len(outputs) == 1


def test_none_is_not_applicable_and_metrics_are_logged():
    logged = {}
    assert PROCESS("x", None) is None
    limits = Limits(timeout_s=0.3)
    CodeTests("process", limits=limits)(
        fenced("if input() == '1':\n    while True: pass"),
        {"inputs": ["1", "2"], "outputs": ["", ""]},
        log_metric=logged.__setitem__,
    )
    assert logged == {"timed_out": 0.5}


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("```python\na\n```\n```py\nb\n```", "b\n"),
        ("```\na\n```", "a\n"),
        ("```python\na\n```\n```text\nb\n```", "a\n"),
        ("<think>```python\na\n```", None),
        ("a = 1", None),
        ("```python\na", None),
        ("```python\na\0\n```", None),
        ("```python\n" + "a" * 70_000 + "\n```", None),
        ("", None),
    ],
    ids=range(9),
)
def test_the_last_block_after_the_reasoning(completion, code):
    assert code_of(completion) == code


@pytest.mark.parametrize(
    ("output", "expected", "tolerance", "same"),
    [
        ("3 7 9\n", "3 7 9", 0, True),
        ("3 7 9  \r\n\n", "3 7 9", 0, True),
        ("3", "3 7 9", 0, False),
        ("3 7 9 1", "3 7 9", 0, False),
        ("3\n7", "3 7", 0, False),
        ("3\n7", "3\n8", 0, False),
        (" 3", "3", 0, False),
        ("", "", 0, True),
        ("0.50", "0.5", 0, False),
        ("0.50 a", "0.5 a", 1e-9, True),
        ("0.6", "0.5", 1e-3, False),
        ("nan", "0.5", 1e9, False),
        ("inf", "0.5", 1e9, False),
    ],
)
def test_same_output(output, expected, tolerance, same):
    assert same_output(output, expected, tolerance) is same


@pytest.mark.parametrize(
    "tests",
    ["", [], 3, [3], {"inputs": ["1"], "outputs": []}, [{"input": "1"}], [{"input": 1, "output": 2}], [{"args": [1], "expected": 2}],
     "for x in f(1):\n    assert x", "x = f(1)\nassert x", "assert True", "assert 1 == 1", "assert (", "[1", "assert f(x) == 1",
     "assert [g for g in f(1)]", "assert f(1) * 10**9", "assert f(1) == 9 ** 9 ** 9", "assert f(1).real == 1", "assert open('x') == f(1)[0:2]",
     "def check(candidate):\n    assert candidate(1)", [{"function": "f", "args": [object()], "expected": 1}]],
    ids=range(22),
)  # fmt: skip
def test_tests_that_cannot_be_read_are_faults(tests):
    with pytest.raises(ValueError):
        read_tests(tests)


def test_expectations_are_not_sent():
    (test,) = read_tests("assert f(1, k=[2]) == 'secret'")
    assert test.calls == (["call", "f", [["i", "0x1"]], [["k", ["l", [["i", "0x2"]]]]]],)
    assert test.passes(["secret"]) and not test.passes(["wrong"])


def test_nothing_runs_before_a_tier_is_named():
    with pytest.raises(SandboxError, match="no tier is named"):
        code_tests()
    with pytest.raises(ValueError, match="mode is 'most'"):
        code_tests("process", mode="most")
    for name, value in (("abs_tol", -1.0), ("max_tests", 0)):
        with pytest.raises(ValueError, match=name):
            code_tests("process", **{name: value})


def test_it_can_be_sent_to_a_worker_and_names_its_tier():
    reward = pickle.loads(pickle.dumps(PROCESS))
    assert reward == PROCESS and "tier process" in reward.describe() and reward.__name__ == "code_tests"
