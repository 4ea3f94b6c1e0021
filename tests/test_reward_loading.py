"""Reward functions are found, understood and refused before training; every message is one line."""

import dataclasses
import functools
import json
import os
import pickle
import sys
import textwrap

import pytest

from grpo.errors import InputError
from grpo.reward_loading import RewardError, check_columns, load_reward_states, load_rewards, reward_states

COLUMNS = ["prompt", "answer", "task"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """A working directory, sys.path and modules of its own for each test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def load_one(function, columns=COLUMNS):
    (reward,) = load_rewards([function], None, columns)
    return reward


def refusal(function, columns=COLUMNS):
    with pytest.raises(InputError) as caught:
        load_rewards([function], None, columns)
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


# --- by name -------------------------------------------------------------------------------------------------


def test_module_in_the_working_directory(tmp_path):
    write(tmp_path / "my_rewards.py", "def right(completion, answer): return float(completion == answer)")
    reward = load_one("my_rewards:right")
    assert reward.function("72", "72") == 1.0
    assert (reward.name, reward.kind, reward.label) == ("right", "sample", 'rewards[0] "my_rewards:right"')


def test_working_directory_wins_while_importing_and_stays_importable_last(tmp_path):
    write(tmp_path / "mod_a.py", "def f(completion):\n    import mod_lazy\n    return mod_lazy.VALUE")
    write(tmp_path / "mod_lazy.py", "VALUE = 3.0")
    other = write(tmp_path / "elsewhere" / "mod_a.py", "def f(completion): return 9.0")
    sys.path.insert(0, str(other.parent))
    assert load_one("mod_a:f").function("x") == 3.0
    assert sys.path[0] == str(other.parent) and sys.path[-1] == str(tmp_path)


def test_dotted_modules_and_attribute_paths(tmp_path):
    write(tmp_path / "pkg" / "__init__.py", "")
    write(
        tmp_path / "pkg" / "deep.py",
        """
        class Judge:
            @staticmethod
            def static(completion): return 1.0
            @classmethod
            def of_class(cls, completion): return 2.0
            def bound(self, completion): return 3.0
        judge = Judge()
        """,
    )
    assert load_one("pkg.deep:Judge.static").function(completion="") == 1.0
    assert load_one("pkg.deep:Judge.of_class").function(completion="") == 2.0
    assert load_one("pkg.deep:judge.bound").function(completion="") == 3.0
    assert "is a method of a class" in refusal("pkg.deep:Judge.bound")


def test_file_relative_and_absolute_is_run_once(tmp_path):
    path = write(
        tmp_path / "sub" / "reward.py",
        """
        from pathlib import Path
        Path("runs.txt").open("a").write("x")
        def one(completion): return 1.0
        def two(completion): return 2.0
        """,
    )
    one, two = load_rewards(["sub/reward.py:one", f"{path}:two"], None, COLUMNS)
    assert (one.function(""), two.function("")) == (1.0, 2.0)
    assert (tmp_path / "runs.txt").read_text() == "x"


def test_edited_file_is_another_module(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = write(tmp_path / "reward.py", "def f(completion): return 1.0")
    os.utime(path, (1_700_000_000, 1_700_000_000))
    old = load_one("reward.py:f")
    path.write_text("def f(completion): return 2.0")
    os.utime(path, (1_700_000_000, 1_700_000_000))  # same size, same second: a bytecode cache does not notice
    assert load_one("reward.py:f").function("") == 2.0
    assert old.function("") == 1.0


def test_file_may_define_dataclasses_pickle_and_import_its_neighbours(tmp_path):
    write(tmp_path / "sub" / "neighbour.py", "VALUE = 5.0")
    write(
        tmp_path / "sub" / "reward.py",
        """
        from __future__ import annotations
        import dataclasses, neighbour
        @dataclasses.dataclass
        class Judge:
            scale: float
            def __call__(self, completion): return self.scale * neighbour.VALUE
        judge = Judge(2.0)
        """,
    )
    reward = load_one("sub/reward.py:judge")
    assert reward.name == "Judge"
    assert pickle.loads(pickle.dumps(reward.function)) == reward.function
    assert dataclasses.replace(reward.function, scale=3.0)(completion="") == 15.0


def test_the_name_of_the_configuration_sketch():
    reward = load_one("rewards:math_accuracy")
    assert (reward.kind, reward.columns, reward.injected) == ("sample", ("answer",), ("completion", "log_metric"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("reward.py:missing_file", ["no such file", "'rewards_.py'"]),
        ("notes.txt:f", ["import failed", "No module named 'notes'"]),
        ("./notes.txt:f", ["is not a .py file"]),
        ("no_module_of_that_name:f", ["import failed: ModuleNotFoundError", "'no_module_of_that_name'"]),
        ("rewards_x:f", ["ModuleNotFoundError", "did you mean 'rewards_'"]),
        ("rewards_:rihgt", ["has no 'rihgt'", "did you mean 'right'", "rewards_.py"]),
        ("rewards_:right.deeper", ["has no 'right.deeper'"]),
        ("rewards_:NUMBER", ["is int (want a function or its name)"]),
        ("rewards_:Judge", ["is a class", "reward = Judge(…)"]),
        ("broken.py:f", ["import failed: SyntaxError"]),
        ("raises.py:f", ["import failed: RuntimeError: boom with a second line"]),
        ("exits.py:f", ["import failed: SystemExit: 0"]),
        ("needs.py:f", ["import failed: ModuleNotFoundError: No module named 'not_there_at_all'"]),
        ("just_a_name", ['want "module:function"']),
        (":f", ['want "module:function"']),
        ("module:", ['want "module:function"']),
    ],
)
def test_names_that_lead_nowhere(tmp_path, name, words):
    write(tmp_path / "rewards_.py", "NUMBER = 3\nclass Judge:\n    pass\ndef right(completion): return 1.0")
    write(tmp_path / "notes.txt", "hello")
    write(tmp_path / "broken.py", "def f(:")
    write(tmp_path / "raises.py", "raise RuntimeError('boom\\nwith a second line')")
    write(tmp_path / "exits.py", "import sys; sys.exit(0)")
    write(tmp_path / "needs.py", "import not_there_at_all")
    line = refusal(name)
    assert line.startswith(f'rewards[0] "{name}": ')
    for word in words:
        assert word in line


def test_failed_file_is_not_remembered(tmp_path):
    path = write(tmp_path / "reward.py", "raise RuntimeError('not yet')\ndef f(completion): return 1.0")
    assert "not yet" in refusal("reward.py:f")
    assert "not yet" in refusal("reward.py:f")  # a half-run module would be found by its name now
    path.write_text("def f(completion): return 1.0")
    assert load_one("reward.py:f").function("") == 1.0


def test_keyboard_interrupt_in_an_import_passes(tmp_path):
    write(tmp_path / "reward.py", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_one("reward.py:f")


def test_original_error_is_chained_for_debugging(tmp_path):
    write(tmp_path / "raises.py", "raise RuntimeError('boom')")
    with pytest.raises(InputError) as caught:
        load_rewards(["raises.py:f"], None, COLUMNS)
    assert isinstance(caught.value.__cause__.__cause__, RuntimeError)


# --- signatures ----------------------------------------------------------------------------------------------


def batch_all(completions, **kwargs): ...
def batch_named(prompts, completions, answer, trainer_state): ...
def batch_prompts_only(prompts): ...
def sample_named(completion, answer, truncated, log_extra=None): ...
def sample_all(completion, **kwargs): ...
def sample_default(completion, other=3): ...
async def sample_async(completion, answer): ...
def keyword_only(*, completion, answer): ...


BATCH = ("prompts", "completions", "completion_ids", "truncated", "trainer_state", "log_extra", "log_metric")
SAMPLE = ("prompt", "completion", "completion_ids", "truncated", "trainer_state", "log_extra", "log_metric")


@pytest.mark.parametrize(
    ("function", "kind", "injected", "columns"),
    [
        (batch_all, "batch", BATCH, ("answer", "task")),
        (batch_named, "batch", ("prompts", "completions", "trainer_state"), ("answer",)),
        (batch_prompts_only, "batch", ("prompts",), ()),
        (sample_named, "sample", ("completion", "truncated", "log_extra"), ("answer",)),
        (sample_all, "sample", SAMPLE, ("answer", "task")),
        (sample_default, "sample", ("completion",), ()),
        (sample_async, "sample", ("completion",), ("answer",)),
        (keyword_only, "sample", ("completion",), ("answer",)),
        (lambda completion, messages: 0.0, "sample", ("completion", "messages"), ()),
    ],
)
def test_what_each_signature_is_given(function, kind, injected, columns):
    reward = load_one(function)
    assert (reward.kind, reward.injected, reward.columns) == (kind, injected, columns)


def test_partial_keeps_what_it_binds():
    def f(completion, answer, task, **kwargs): ...

    reward = load_one(functools.partial(functools.partial(f, answer="mine"), task="x"))
    assert reward.name == "f"
    assert "answer" not in reward.columns and "task" not in reward.columns  # the dataset has both
    assert reward.function(completion="") is None


def test_names_of_objects_and_methods():
    class LengthJudge:
        def __call__(self, completion):
            return 0.0

        def short(self, completion):
            return 1.0

    assert load_one(LengthJudge()).name == "LengthJudge"
    assert load_one(LengthJudge().short).name == "short"
    assert load_one(functools.partial(LengthJudge().short)).label == 'rewards[0] "short"'


def positional_only(completion, answer, /): ...
def both(completions, completion): ...
def verl(data_source, solution_str, ground_truth, extra_info=None): ...
def openrlhf(queries, prompts, labels): ...
def reasoning_gym(answer, entry): ...
def verifiers(prompt, completion, answer, state): ...


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (positional_only, ["parameter 'completion' is positional-only"]),
        (both, ["has both 'completions' and 'completion'"]),
        (
            lambda completion, answr: 0,
            ["parameter 'answr' is provided by nothing (did you mean 'answer'?)", "answer, task"],
        ),
        (lambda completions, prompt: 0, ["parameter 'prompt' is provided by nothing (did you mean 'prompts'?)"]),
        (lambda completion, prefill: 0, ["parameter 'prefill' is provided by nothing"]),
        (lambda completons: 0, ["has neither a parameter 'completions'", "did you mean 'completions'"]),
        (lambda **kwargs: 0, ["has neither a parameter 'completions'"]),
        (lambda: 0, ["has neither a parameter 'completions'"]),
        (verl, ["looks like verl's", "rewards.adapters.from_verl(compute_score)"]),
        (openrlhf, ["'queries'", "looks like OpenRLHF's"]),
        (reasoning_gym, ["looks like reasoning-gym's", "rewards.adapters.from_reasoning_gym"]),
        (verifiers, ["'state'", "looks like a verifiers rubric"]),
        (len, ["positional-only"]),
        (7, ["is int (want a function or its name)"]),
        (None, ["is NoneType"]),
        (dict, ["is a class"]),
    ],
)
def test_signatures_that_cannot_be_served(function, words):
    line = refusal(function)
    assert line.startswith("rewards[0] ")
    for word in words:
        assert word in line


def test_reward_model_is_told_how_to_be_wrapped():
    import torch

    assert "looks like a reward model" in refusal(torch.nn.Linear(2, 1))


@pytest.mark.parametrize(
    ("function", "column", "refused"),
    [
        (lambda completions, truncated: 0, "truncated", True),
        (lambda completions, **kwargs: 0, "trainer_state", True),
        (lambda completions: 0, "trainer_state", False),
        (lambda completion, messages: 0, "messages", True),
        (lambda completion, **kwargs: 0, "messages", False),  # a common column: it is passed as one
        (lambda completions, messages: 0, "messages", False),
        (lambda completions, **kwargs: 0, "completion_ids", False),  # never passed as a column
    ],
)
def test_columns_with_the_name_of_something_injected(function, column, refused):
    if refused:
        assert f"column {column!r} has the name" in refusal(function, ["prompt", column])
    else:
        load_one(function, ["prompt", column])


def test_every_problem_is_told_at_once():
    with pytest.raises(InputError) as caught:
        load_rewards(["nowhere_to_be_found:f", batch_all, lambda completion, nothing: 0], None, COLUMNS)
    assert [line.split(" ")[0] for line in caught.value.lines] == ["rewards[0]", "rewards[2]"]


def test_equal_names_are_refused():
    with pytest.raises(
        InputError, match=r'rewards\[2\] "batch_all": has the metric name .* as rewards\[0\] "batch_all"'
    ):
        load_rewards([batch_all, batch_named, batch_all], None, COLUMNS)


# --- weights -------------------------------------------------------------------------------------------------


def test_weights_of_a_list_of_pairs_and_by_default():
    def weights(functions, given=None):
        return [reward.weight for reward in load_rewards(functions, given, COLUMNS)]

    assert weights([batch_all, batch_named]) == [1.0, 1.0]
    assert weights([batch_all, batch_named], [2, 0]) == [2.0, 0.0]
    assert weights([(batch_all, 0.5), batch_named]) == [0.5, 1.0]


@pytest.mark.parametrize(
    ("functions", "weights", "words"),
    [
        ([batch_all], [1, 2], "rewards.weights has 2 values for 1 functions"),
        ([batch_all], [float("nan")], "weight is nan"),
        ([batch_all], [float("inf")], "weight is inf"),
        ([batch_all], [1e9], "weight is 1000000000.0"),
        ([batch_all], ["1"], "weight is '1'"),
        ([batch_all], [True], "weight is True"),
        ([batch_all, batch_named], [0, 0], "every weight is 0"),
        ([(batch_all, 1.0)], [1.0], r"rewards\[0\] is a tuple"),
        ([(batch_all,)], None, r"rewards\[0\] is a tuple"),
        ("module:function", None, "rewards is str"),
    ],
)
def test_weights_that_cannot_be_used(functions, weights, words):
    with pytest.raises(InputError, match=words):
        load_rewards(functions, weights, COLUMNS)


# --- other datasets, state -----------------------------------------------------------------------------------


def test_columns_of_another_dataset_are_checked():
    rewards = load_rewards([lambda completion, answer, task=None: 0.0, batch_all], None, COLUMNS)
    check_columns(rewards, ["prompt", "answer"], "data.eval")
    with pytest.raises(
        InputError, match=r"data.eval: no column 'answer', which rewards\[0\] .* \(did you mean 'answers'\?\)"
    ):
        check_columns(rewards, ["prompt", "answers", "task"], "data.eval")


class Counter:
    def __init__(self, state=None):
        self.state = {"seen": [0]} if state is None else state

    def __call__(self, completion):
        self.state["seen"][0] += 1
        return 1.0

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_state_goes_round_as_json_and_shares_nothing():
    counter = Counter()
    rewards = load_rewards([counter, batch_all], None, COLUMNS)
    rewards[1].metric_names.append("length")
    saved = reward_states(rewards)
    counter(completion="")  # moves on in place
    assert saved == {"Counter": {"metric_names": [], "state": {"seen": [0]}}, "batch_all": {"metric_names": ["length"]}}

    fresh = load_rewards([Counter({"seen": [9]}), batch_all], None, COLUMNS)
    assert json.loads(json.dumps(saved)) == saved
    load_reward_states(fresh, saved)
    assert fresh[0].function.state == {"seen": [0]} and fresh[1].metric_names == ["length"]
    fresh[0].function(completion="")
    assert saved["Counter"]["state"] == {"seen": [0]}


def test_state_of_a_bound_method_is_that_of_its_object():
    class Judge(Counter):
        def score(self, completion):
            return 1.0

    assert reward_states([load_one(Judge().score)])["score"]["state"] == {"seen": [0]}


def test_state_that_cannot_be_kept_is_refused_before_training():
    class NotJson(Counter):
        def state_dict(self):
            return {"a": object()}

    class Raises(Counter):
        def state_dict(self):
            raise RuntimeError("boom")

    assert "state_dict() gave no JSON values: TypeError" in refusal(NotJson())
    assert "state_dict() gave no JSON values: RuntimeError: boom" in refusal(Raises())
    assert "state_dict() gave no JSON values: ValueError" in refusal(Counter({"a": float("nan")}))


def test_state_that_does_not_fit_is_said():
    reward = load_one(Counter())
    with pytest.raises(InputError, match="the checkpoint holds no state for it"):
        load_reward_states([reward], {"Counter": {"metric_names": []}})
    reward.function.load_state_dict = lambda state: state["nothing"]
    with pytest.raises(InputError, match="load_state_dict failed: KeyError: 'nothing'"):
        load_reward_states([reward], {"Counter": {"metric_names": [], "state": {}}})
    load_reward_states([reward], {})  # a function that is new to the run keeps its state
    reward.function.state = {"a": object()}
    with pytest.raises(RewardError, match=r'rewards\[0\] "Counter": state_dict'):
        reward_states([reward])
