"""Arguments, range and tier of a reward in a configuration, and the prefill that a reward is given."""

import functools
import re
from pathlib import Path

import pytest
import yaml

from grpo.config import GRPOConfig
from grpo.errors import InputError
from grpo.reward_arguments import all_arguments, with_arguments
from grpo.scoring import RewardError, RewardSpec, close_pools, load_rewards, placement_lines, score
from rewards.code import CodeTests
from tests.rewards.factories import anything, length, prefilled, prefilled_batch, takes_the_column, times
from tests.test_scoring import make_rollouts

HERE = "tests.rewards.factories:"
COLUMNS = ["prompt", "answer"]
CODE = "rewards:code_tests"


def from_yaml(text):
    """The specifications of a configuration, as a run makes them."""
    config = GRPOConfig(rewards=yaml.safe_load(text))
    return [RewardSpec(**entry.model_dump()) for entry in config.rewards.functions]


def parts(specs, texts=(("ab", "c"), ("", "defg")), **options):
    rewards = load_rewards(specs, None, COLUMNS, **options)
    try:
        return score(make_rollouts([list(group) for group in texts]), rewards, step=1, max_steps=9).parts
    finally:
        close_pools(rewards)


def lines(*specs):
    with pytest.raises(InputError) as error:
        load_rewards(list(specs), None, COLUMNS)
    return error.value.lines


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", ", where: process, timeout_s: 20"])
def test_arguments_reach_factories_and_functions(where):
    """A factory is called, a function gets them bound; the values in a worker process are the same."""
    specs = from_yaml(f"""
- {{function: "{HERE}times", arguments: {{factor: 3, offset: 0.5}}{where}}}
- {{function: "{HERE}times", arguments: {{factor: 2}}, name: twice{where}}}
- {{function: "{HERE}length", arguments: {{factor: -1.0}}{where}}}
- {{function: "{HERE}batch_length", arguments: {{factor: 10}}{where}}}
""")
    found = parts(specs)
    sizes = [[2, 1], [0, 4]]
    expected = {
        "times": [[3 * n + 0.5 for n in group] for group in sizes],
        "twice": [[2.0 * n for n in group] for group in sizes],
        "length": [[-1.0 * n for n in group] for group in sizes],
        "batch_length": [[10.0 * n for n in group] for group in sizes],
    }
    assert found == expected


def test_the_same_from_python():
    assert parts([RewardSpec(times, arguments={"factor": 3})]) == parts([times(3)])
    assert parts([RewardSpec(length, arguments={"factor": 3})]) == parts([functools.partial(length, factor=3)])
    assert parts([RewardSpec(times, arguments={"factor": 3}, where="process")]) == parts([times(3)])
    assert parts([RewardSpec(anything, arguments={"a": 1, "b": 2}, name="x")])["x"] == [[2.0, 2.0], [2.0, 2.0]]


@pytest.mark.parametrize(
    ("spec", "texts"),
    [
        (RewardSpec(HERE + "times", arguments={"factr": 1}), ["takes no 'factr' (did you mean 'factor'? it takes factor, offset, name)"]),
        (RewardSpec(HERE + "times", arguments={"q": 1, "z": 2}), ["takes no 'q' (it takes factor, offset, name)", "takes no 'z'"]),
        (RewardSpec(HERE + "times", arguments={"offset": 1}), ["arguments: factor missing (it takes factor, offset, name)"]),
        (RewardSpec(HERE + "times", arguments={}), ["arguments: factor missing"]),
        (RewardSpec(HERE + "times", arguments={"factor": 0}), ["with its arguments: ValueError: factor is 0 (want another)"]),
        (RewardSpec(HERE + "times"), ["if it makes a reward, give it arguments: {…} (it takes factor, offset, name)"]),
        (RewardSpec(HERE + "no_reward", arguments={"size": 3}), ["with its arguments made 3 (want a reward function)"]),
        (RewardSpec(HERE + "length", arguments={"fctor": 1}), ["takes no 'fctor' (did you mean 'factor'? it takes factor)"]),
        (RewardSpec(HERE + "length", arguments={"completion": "x"}), ["arguments.completion: every call gives that"]),
        (RewardSpec(HERE + "times", arguments={"factor": {1}}), ["arguments.factor is {1} (want JSON values)"]),
        (RewardSpec(HERE + "times", arguments={"factor": float("nan")}), ["arguments.factor is nan (want JSON values)"]),
        (RewardSpec(HERE + "times", arguments=[1]), ["arguments is [1] (want names and values)"]),
        (RewardSpec("rewards:soft_overlong", arguments={"max_length": 9}), ["parameter 'buffer' is provided by nothing"]),
        (RewardSpec(CODE, arguments={"max_tests": 3}), ["SandboxError: running model-written code: no tier is named"]),
        (RewardSpec(CODE, arguments={"tier": "proces"}), ["'proces' is no tier (want one of process, namespace"]),
        (RewardSpec(CODE, arguments={"tier": "process", "max_length": 5}), ["takes no 'max_length' (it takes tier, mode, limits"]),
        (RewardSpec(CODE, arguments={"tier": "process", "limits": {"timeout": 5}}), ["with its arguments: TypeError", "timeout"]),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_one_line_each(spec, texts):
    found = lines(spec)
    assert all(line.startswith('rewards[0] "') for line in found)
    assert all(text in "\n".join(found) for text in texts), found


def test_problems_of_all_functions_are_told_at_once():
    found = lines(RewardSpec(HERE + "times", arguments={"a": 1}), RewardSpec(HERE + "length", arguments={"b": 1}))
    assert [line[:10] for line in found] == ["rewards[0]", "rewards[1]"]


def test_a_worker_cannot_find_a_closure_with_arguments():
    inner = times(2)
    (line,) = lines(RewardSpec(inner, arguments={}, where="process"))
    assert "where is process (want a function that a worker can import" in line


# --- tier --------------------------------------------------------------------------------------------------------


def test_tier_is_the_argument_of_that_name():
    (spec,) = from_yaml(f"[{{function: {CODE}, tier: process, arguments: {{max_tests: 2, limits: {{timeout_s: 3}}}}}}]")
    (reward,) = load_rewards([spec], None, ["prompt", "tests"])
    assert isinstance(reward.function, CodeTests)
    assert (reward.function.tier, reward.function.max_tests, reward.function.limits.timeout_s) == ("process", 2, 3)
    assert any("code runs in tier process" in line for line in placement_lines([reward]))


def test_tiers_that_do_not_fit():
    (line,) = lines(RewardSpec(CODE, tier="process", arguments={"tier": "confined"}))
    assert "tier is 'process' and arguments.tier 'confined' (want one)" in line
    (line,) = lines(RewardSpec(HERE + "length", tier="process"))
    assert "takes no 'tier'" in line
    assert all_arguments(None, None, "") is None and all_arguments({}, None, "") == {}
    assert with_arguments(length, None, "") is length


# --- range -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [None, "process"])
def test_a_value_outside_its_range_is_a_fault(where):
    texts = [["ab", "c"], ["", "defg"]]
    spec = RewardSpec(HERE + "length", range=(1.0, 4.0), where=where)
    rewards = load_rewards([spec], None, COLUMNS)
    scored = score(make_rollouts(texts), rewards, step=1, max_steps=9, on_error="none")
    assert scored.rewards == [[2.0, 1.0], [None, 4.0]]  # the ends belong to it
    assert scored.columns["fault"][1][0].endswith("returned 0 (want its range, 1 to 4)")
    assert scored.metrics["rewards/length/error_frac"] == 0.25
    with pytest.raises(RewardError, match=r"returned 0 \(want its range, 1 to 4\)"):
        score(make_rollouts(texts), rewards, step=1, max_steps=9)
    close_pools(rewards)


@pytest.mark.parametrize("given", [(1.0, 1.0), (2.0, 1.0), (0.0, 1e7), (0.0,), "ab", (0.0, "1")])
def test_ranges_that_are_none(given):
    (line,) = lines(RewardSpec(HERE + "length", range=given))
    assert "range is " in line and "want [lowest, highest]" in line


# --- prefill -----------------------------------------------------------------------------------------------------


def test_prefill_of_the_template_reaches_chat_prompts_that_name_it():
    chat = [{"role": "user", "content": "hi"}]
    rewards = load_rewards([prefilled, prefilled_batch], None, COLUMNS, prefill="<think>\n")
    rollouts = make_rollouts([["ab", "c"]])
    rollouts.prompts[0].example["prompt"] = chat
    assert score(rollouts, rewards, step=1, max_steps=9).parts == {
        "prefilled": [[8.0, 8.0]],
        "prefilled_batch": [[8.0, 8.0]],
    }
    rollouts.prompts[0].example["prompt"] = "1 + 1? <think>"  # text: what the prompt itself has opened
    assert score(rollouts, rewards, step=1, max_steps=9).parts["prefilled"] == [[7.0, 7.0]]
    rollouts.prompts[0].example["prompt"] = "1 + 1?"
    assert score(rollouts, rewards, step=1, max_steps=9).parts["prefilled"] == [[0.0, 0.0]]


def test_without_a_known_prefill_the_default_stays():
    assert parts([prefilled])["prefilled"] == [[-1.0, -1.0], [-1.0, -1.0]]
    (line,) = lines(prefilled_batch)
    assert "parameter 'prefill' is provided by nothing" in line
    assert parts([RewardSpec(prefilled, arguments={"prefill": "<think>"})], prefill="x")["prefilled"][0] == [7.0, 7.0]


def test_a_column_of_that_name_stays_the_column_for_kwargs():
    rewards = load_rewards([takes_the_column], None, [*COLUMNS, "prefill"], prefill="<think>")
    rollouts = make_rollouts([["ab"]])
    rollouts.prompts[0].example["prefill"] = 5
    assert score(rollouts, rewards, step=1, max_steps=9).parts["takes_the_column"] == [[5.0]]


def test_format_rewards_with_a_prefilled_template():
    """Pitfall 4: 0 for ever without, right with; from the template and as an argument."""
    texts = [["hm</think><answer>72</answer>"]]
    strict = "rewards:think_answer_format"
    assert parts([strict], texts)["think_answer_format"] == [[0.0]]
    assert parts([RewardSpec(strict, arguments={"prefill": "<think>\n"})], texts)["think_answer_format"] == [[1.0]]
    rollouts = make_rollouts(texts)
    rollouts.prompts[0].example["prompt"] = [{"role": "user", "content": "hi"}]
    rewards = load_rewards([strict], None, COLUMNS, prefill="<think>\n")
    assert score(rollouts, rewards, step=1, max_steps=9).parts["think_answer_format"] == [[1.0]]


def test_the_block_in_the_readme_loads():
    (text,) = re.findall(r"```yml\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)
    config = GRPOConfig(**yaml.safe_load(text.replace("tier: confined", "tier: process")))
    specs = [RewardSpec(**entry.model_dump()) for entry in config.rewards.functions]
    code, overlong, form = load_rewards(specs, None, ["prompt", "tests"])
    assert code.function.limits.timeout_s == 2 and code.range == (0.0, 1.0)
    assert overlong.function("…", [5] * 4096) == -1.0 and form.function("hm</think>72") == 1.0
