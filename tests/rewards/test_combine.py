"""Combinators: values, None, names, signatures in both forms, faults that must not be hidden, and the trainer's loader."""

import asyncio
import functools
import inspect
import math
import warnings
from types import SimpleNamespace

import pytest

from grpo.reward_loading import load_rewards
from rewards import Score, boxed, numeric
from rewards.combine import clip, extracted, gate, product, route, schedule, weighted_sum
from rewards.parts import Combined

NAN, INF = math.nan, math.inf


def one(completion):
    return float(completion)


def two(completion, other):
    return None if other is None else float(other)


def batch_one(completions, **columns):
    return [float(completion) for completion in completions]


def batch_two(prompts, completions, other):
    return [None if each is None else float(each) for each in other]


def both(combine, rows):
    """Values of the per-sample form, after checking that the batch form and mixtures give the same."""
    given = {"prompts": ["p"] * len(rows), "completions": [str(a) for a, _ in rows], "other": [b for _, b in rows]}
    single = [combine(one, two)(completion=str(a), other=b) for a, b in rows]
    for first, second in ((batch_one, batch_two), (one, batch_two), (batch_one, two)):
        mixed = combine(first, second)
        assert mixed.kind == "batch" and mixed(**given) == single
    return single


ROWS = [(2, 3), (0.5, None), (-1, 4), (0, 0.25), (1, 1), (0, None)]


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        (lambda a, b: weighted_sum((a, 1.0), (b, 0.5)), [3.5, 0.5, 1.0, 0.125, 1.5, 0.0]),
        (lambda a, b: weighted_sum((a, -2.0), (b, 0.0)), [-4.0, -1.0, 2.0, 0.0, -2.0, 0.0]),
        (product, [6.0, 0.5, -4.0, 0.0, 1.0, 0.0]),
        (gate, [2.0, 0.5, -1.0, 0.0, 1.0, 0.0]),
        (functools.partial(gate, threshold=3.5), [0.0, 0.5, -1.0, 0.0, 0.0, 0.0]),
        (functools.partial(gate, threshold=3.5, closed=-0.5), [-0.5, 0.5, -1.0, -0.5, -0.5, 0.0]),
        (lambda a, b: gate(b, a, threshold=1.0), [3.0, None, 0.0, 0.0, 1.0, None]),
        (lambda a, b: clip(weighted_sum((a, 1.0), (b, 1.0)), 0.3, 2.5), [2.5, 0.5, 2.5, 0.3, 2.0, 0.3]),
    ],
)
def test_values(combine, expected):
    assert both(combine, ROWS) == pytest.approx(expected)


def test_closing_a_gate_never_pays():
    """−1 for a wrong answer must not become 0 by dropping the format."""
    assert gate(lambda completion: -1.0, lambda completion: 0.0)(completion="x") == -1.0


@pytest.mark.parametrize("combine", [weighted_sum, product])
def test_none_of_all_parts_is_none(combine):
    parts = [two, functools.partial(two)]
    parts = [(part, 1.0) for part in parts] if combine is weighted_sum else parts
    assert combine(*parts)(completion="x", other=None) is None


def test_clip_and_schedule_keep_none():
    assert clip(two, 0, 1)(completion="x", other=None) is None
    assert schedule(two, [(0, 1.0)])(completion="x", other=None, trainer_state=SimpleNamespace(global_step=1)) is None


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1.0), (10, 1.0), (15, 0.75), (20, 0.5), (60, 0.25), (100, 0.0), (101, 0.0)]
)
def test_schedule(step, expected):
    scheduled = schedule(lambda completion: 2.0, [(10, 1.0), (20, 0.5), (100, 0.0)])
    assert scheduled(completion="x", trainer_state=SimpleNamespace(global_step=step)) == pytest.approx(2 * expected)
    together = schedule(lambda completions: [2.0, None], [(10, 1.0), (20, 0.5), (100, 0.0)])
    values = together(completions=["x", "y"], trainer_state=SimpleNamespace(global_step=step))
    assert values == [pytest.approx(2 * expected), None]


@pytest.mark.parametrize("points", [[], [(5, 1.0), (5, 0.0)], [(5, 1.0), (1, 0.0)], [(0, NAN)]])
def test_schedule_refuses_points_that_make_no_sense(points):
    with pytest.raises(ValueError, match=r"schedule over|factor is"):
        schedule(one, points)


def test_route_calls_each_part_with_its_own_rows_only():
    seen = {}

    def math_part(completions, answer):
        seen["math"] = (completions, answer)
        return [1.0] * len(completions)

    def code_part(completion, answer):
        seen.setdefault("code", []).append((completion, answer))
        return None if completion == "c" else 2.0

    routed = route({"math": math_part, "code": code_part, "never": batch_one})
    logged = []
    with pytest.warns(UserWarning, match=r"no reward for task 'coding' \(there are: 'math', 'code', 'never'\)"):
        values = routed(
            completions=["a", "b", "c", "d", "e"],
            answer=[1, 2, 3, 4, 5],
            task=["math", "code", "code", "coding", "math"],
            log_metric=lambda *entry: logged.append(entry),
        )
    assert values == [1.0, 2.0, None, None, 1.0]  # mistake C is None, counted and warned of
    assert seen == {"math": (["a", "e"], [1, 5]), "code": [("b", 2), ("c", 3)]}
    assert [value for name, value in logged if name == "unknown_task"] == [0.0, 0.0, 0.0, 1.0, 0.0]


def test_route_warns_once_for_a_task():
    routed = route({"math": one}, column="kind")
    with pytest.warns(UserWarning, match="no reward for kind"):
        assert routed(completion="1", kind="code") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert routed(completion="1", kind="code") is None
    with pytest.warns(UserWarning, match="no reward for kind 'prose'"):
        assert routed(completion="1", kind="prose") is None


@pytest.mark.parametrize(
    ("value", "error"),
    [(NAN, ValueError), (INF, ValueError), (-INF, ValueError), ("1", TypeError), ([1.0], TypeError), (1j, TypeError)],
)
@pytest.mark.parametrize(
    "combine",
    [
        lambda part: clip(part, 0, 1),
        lambda part: gate(one, part),
        lambda part: gate(part, one),
        lambda part: product(one, part),
        lambda part: weighted_sum((part, 0.0), (one, 1.0)),
    ],
)
def test_a_fault_of_a_part_is_not_hidden(combine, value, error):
    with pytest.raises(error, match="faulty"):

        def faulty(completion):
            return value

        combine(faulty)(completion="0")


def test_two_negative_factors_are_an_error():
    with pytest.raises(ValueError, match="two negative factors"):
        product(one, two)(completion="-1", other=-1)


@pytest.mark.parametrize(
    ("result", "error"),
    [([1.0], ValueError), ([1.0] * 3, ValueError), (1.0, TypeError), (None, TypeError), ({}, TypeError)],
)
def test_a_batch_part_of_the_wrong_length_is_named(result, error):
    def short(completions):
        return result

    with pytest.raises(error, match="short returned"):
        clip(short, 0, 1)(completions=["a", "b"])


def test_names_and_signatures():
    assert [gate(one, two).__name__, clip(two, 0, 1).__name__, schedule(one, [(0, 1)]).__name__] == [
        "one",
        "two",
        "one",
    ]
    assert weighted_sum((one, 1), (functools.partial(two, other=3), 1)).__name__ == "one_plus_two"
    assert weighted_sum((one, 1), name="total").__name__ == "total" and product(one, two).__name__ == "one_times_two"
    assert str(inspect.signature(gate(one, two))) == "(*, completion, other, log_metric=None)"
    mixed = inspect.signature(gate(batch_two, one))
    assert list(mixed.parameters) == ["completions", "prompts", "other", "log_metric"]
    assert list(inspect.signature(schedule(functools.partial(two, other=3), [(0, 1)])).parameters) == [
        "completion",
        "trainer_state",
        "log_metric",
    ]


def test_the_trainer_loads_combinations_and_gives_them_what_their_parts_need():
    combined = weighted_sum((schedule(gate(one, two), [(0, 1.0)]), 1.0), (batch_one, 0.1), name="total")
    (loaded,) = load_rewards([combined], None, ["other", "unused"])
    assert (loaded.name, loaded.kind) == ("total", "batch")
    assert set(loaded.columns) == {"other", "unused"} and loaded.required == {"other"}
    assert {"completions", "trainer_state", "log_metric"} <= set(loaded.injected)
    (loaded,) = load_rewards([extracted(numeric, boxed)], None, ["answer", "unused"])
    assert (loaded.kind, loaded.columns) == ("sample", ("answer",))


def test_chat_messages_reach_each_form_as_it_wants_them():
    def sample(completion, prompt, messages, completion_ids):
        assert prompt == [{"role": "user", "content": "q"}] and completion_ids in ([1], [2])
        assert messages == [*prompt, {"role": "assistant", "content": completion}]
        return float(completion)

    def batch(completions):
        return [float(each[0]["content"]) for each in completions]

    chat = [[{"role": "assistant", "content": text}] for text in "34"]
    total = weighted_sum((sample, 1.0), (batch, 10.0))
    prompts = [[{"role": "user", "content": "q"}]] * 2
    assert total(prompts=prompts, completions=chat, completion_ids=[[1], [2]]) == [33.0, 44.0]


def test_parts_get_their_own_copies():
    def spoiler(completions, answer):
        completions.clear()
        answer[0].append(9)
        return [0.0, 0.0]

    def reader(completion, answer):
        return float(len(answer))

    def late(completions, answer):
        return [float(len(each)) for each in answer]

    total = weighted_sum((spoiler, 1.0), (reader, 1.0), (late, 1.0))
    assert total(completions=["a", "b"], answer=[[1], [2, 3]]) == [2.0, 4.0]


@pytest.mark.parametrize("form", ["sample", "batch"])
def test_async_parts_make_an_async_combination(form):
    async def slow(completion):
        await asyncio.sleep(0)
        return float(completion)

    async def slow_batch(completions):
        await asyncio.sleep(0)
        return [float(each) for each in completions]

    if form == "sample":
        assert asyncio.run(gate(slow, one)(completion="3")) == 3.0
    else:
        total = weighted_sum((slow, 1.0), (slow_batch, 1.0), (one, 1.0))
        assert asyncio.run(total(completions=["1", "2"])) == [3.0, 6.0]


def test_logging():
    """Every part's values, notes of a Score, and columns of per-sample parts put together for the batch."""
    metrics, columns = [], {}

    def noted(completion):
        return Score(float(completion), steps=3, why="text")

    def cells(completion, log_extra):
        log_extra("said", completion * 2)
        return None if completion == "1" else 0.5

    def whole(completions, log_extra):
        log_extra("length", [len(each) for each in completions])
        return [0.0] * len(completions)

    total = weighted_sum((noted, 1.0), (cells, 1.0), (whole, 1.0))
    values = total(
        completions=["1", "2"], log_metric=lambda *entry: metrics.append(entry), log_extra=columns.__setitem__
    )
    assert values == [1.0, 2.5]
    assert columns == {"said": ["11", "22"], "length": [1, 1]}
    assert metrics == [
        *[("noted_steps", 3.0), ("noted", 1.0), ("noted_steps", 3.0), ("noted", 2.0)],
        *[("cells", 0.5), ("whole", 0.0), ("whole", 0.0)],
    ]


def test_states_of_parts_are_kept():
    class Counter:
        def __init__(self):
            self.num = 0

        def __call__(self, completion):
            self.num += 1
            return float(self.num)

        def state_dict(self):
            return {"num": self.num}

        def load_state_dict(self, state):
            self.num = state["num"]

    first = gate(Counter(), one)
    assert [first(completion="1"), first(completion="1")] == [1.0, 2.0]
    second = gate(Counter(), one)
    second.load_state_dict(first.state_dict())
    assert second(completion="1") == 3.0 and first.state_dict() == {"0": {"num": 2}}


def test_extracted():
    wants = functools.partial(numeric, abs_tol=0.5)
    reward = extracted(wants, boxed, name="boxed_number")
    assert reward.__name__ == "boxed_number" and "abs_tol" not in inspect.signature(reward).parameters
    assert reward(completion=r"9 \boxed{72.4}", answer="72") == 1.0
    assert reward(completion="72", answer="72") == 0.0 and reward(completion="72", answer="x") is None
    with pytest.raises(TypeError, match="judges whole batches"):
        extracted(batch_one, boxed)


def test_what_is_no_reward_function_is_an_error():
    for wrong in (lambda text: 1.0, 3, dict):
        with pytest.raises((TypeError, ValueError)):
            gate(wrong, one)
    with pytest.raises(ValueError, match="nothing to combine"):
        product()
    with pytest.raises(ValueError, match="at least one condition"):
        gate(one)
    with pytest.raises(ValueError, match="low at most high"):
        clip(one, 1, 0)
    with pytest.raises(ValueError, match="weight is nan"):
        weighted_sum((one, NAN))


def test_numpy_and_tensors_are_numbers():
    np = pytest.importorskip("numpy")
    assert clip(lambda completions: np.array([0.5, 3.0]), 0, 1)(completions=["a", "b"]) == [0.5, 1.0]
    assert clip(lambda completion: np.float32(0.5), 0, 1)(completion="a") == 0.5
    assert isinstance(Combined([one], lambda values, given: values[0]), Combined)
