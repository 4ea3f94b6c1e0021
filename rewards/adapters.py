"""Adapters: reward functions that were written for other trainers, as functions that this one calls by name.

    from_verl(compute_score)        per sample: data_source, solution_str, ground_truth, extra_info -> float | dict
    from_openrlhf(reward_func)      batch: queries, prompts, labels -> {rewards, scores, extra_logs}
    from_verifiers(function)        per sample: prompt, completion, answer, state, task, info, by name
    from_reasoning_gym(score)       per sample: score_answer(answer, entry)

Source: the signatures of verl, OpenRLHF, verifiers and reasoning-gym as documented there. Plain and async functions.
Left out: functions behind a URL, group functions of verifiers, and rubrics as objects (pass their functions).
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.check_calls import name_of
from rewards.extract import after_think, xml_tag
from rewards.probes import plain_prompt
from rewards.score import Score


def from_verl(compute_score: Callable[..., Any]) -> Callable[..., Any]:
    """verl's `compute_score(data_source, solution_str, ground_truth, extra_info)` as a reward.

    The ground truth is `reward_model["ground_truth"]` of the row, else its column `ground_truth`, else `answer`. Of a
    dict, `score` is the reward and the rest are notes.

    Raises:
        ValueError: (when called) the row has no ground truth.

    >>> def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    ...     return {"score": float(solution_str == ground_truth), "length": len(solution_str)}
    >>> from_verl(compute_score)(completion="72", reward_model={"ground_truth": "72"})
    Score(1.0, length=2)
    """
    accepted = _accepted(compute_score)

    def arguments(completion: str, row: Mapping[str, Any]) -> dict[str, Any]:
        nested = row.get("reward_model")
        candidates = [nested.get("ground_truth") if isinstance(nested, Mapping) else None]
        candidates += [row.get("ground_truth"), row.get("answer")]
        truth = next((each for each in candidates if each is not None), None)
        if truth is None:
            raise ValueError("verl: the row has no reward_model['ground_truth'], ground_truth or answer")
        given = {"data_source": row.get("data_source"), "solution_str": completion, "ground_truth": truth}
        return accepted(given | {"extra_info": row.get("extra_info")})

    def finished(result: Any) -> Any:
        if not isinstance(result, Mapping):
            return result
        return Score(result["score"], **{str(k): _note(v) for k, v in result.items() if k != "score"})

    if _is_async(compute_score):

        async def later(
            completion: str, data_source: Any = None, ground_truth: Any = None, answer: Any = None,
            reward_model: Any = None, extra_info: Any = None,
        ) -> Any:  # fmt: skip
            return finished(await compute_score(**arguments(completion, locals())))

        return _named(later, compute_score)

    def reward(
        completion: str, data_source: Any = None, ground_truth: Any = None, answer: Any = None,
        reward_model: Any = None, extra_info: Any = None,
    ) -> Any:  # fmt: skip
        return finished(compute_score(**arguments(completion, locals())))

    return _named(reward, compute_score)


def from_openrlhf(reward_func: Callable[..., Any], label_column: str = "label") -> Callable[..., Any]:
    """OpenRLHF's `reward_func(queries, prompts, labels)` as a reward; a query is prompt + response.

    Args:
        reward_func: returns a dict with `rewards`; `scores` and `extra_logs` are logged as metrics (means).
        label_column: the column that becomes `labels`; `answer` where rows have no such column.

    >>> def reward_func(queries, prompts, labels, **kwargs):
    ...     return {"rewards": [float(query.endswith(label)) for query, label in zip(queries, labels)]}
    >>> from_openrlhf(reward_func)(prompts=["1 + 1 = "], completions=["2"], answer=["2"])
    [1.0]
    """

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None, **columns: Any,
    ) -> Any:  # fmt: skip
        texts = [plain_prompt(prompt) for prompt in prompts]
        queries = [text + plain_prompt(said) for text, said in zip(texts, completions, strict=True)]
        labels = columns.get(label_column) or columns.get("answer") or [None] * len(texts)
        result = reward_func(queries, texts, labels)
        if not isinstance(result, Mapping):
            return _flat(result)
        logs = {"scores": result.get("scores")} | dict(result.get("extra_logs") or {})
        for name, values in logs.items():
            if log_metric is not None and values is not None:
                numbers = _flat(values)
                log_metric(name, sum(numbers) / len(numbers))
        return _flat(result["rewards"])

    return _named(reward, reward_func)


def from_verifiers(function: Callable[..., Any], *, chat: bool = True, **objects: Any) -> Callable[..., Any]:
    """A rubric function of verifiers as a reward: it gets what it names of those at the top.

    Args:
        function: returns a float; plain or async.
        chat: give the completion as messages, as verifiers' chat environments do; False: as text.
        objects: further arguments, such as `parser`.

    >>> from_verifiers(lambda completion, answer: float(completion[-1]["content"] == answer))(
    ...     prompt="1 + 1?", completion="2", answer="2")
    1.0
    """
    accepted = _accepted(function)

    def reward(prompt: Any, completion: str, answer: Any = "", task: Any = "default", info: Any = None) -> Any:
        said = [{"role": "assistant", "content": completion}] if chat else completion
        info = json.loads(info) if isinstance(info, str) and info else (info or {})
        row = {"prompt": prompt, "completion": said, "answer": answer, "task": task, "info": info}
        return function(**accepted(row | {"state": dict(row)} | objects))  # an awaitable, where it is async

    return _named(reward, function)


def from_reasoning_gym(
    score: str | Callable[[Any, Any], float] | Any, extract: Callable[[str], str | None] | None = None
) -> Callable[..., float]:
    """reasoning-gym's `score_answer(answer, entry)` as a reward, with its partial credit.

    Args:
        score: a task's name, a dataset, or a function of (answer, entry).
        extract: finds the answer in a completion; None: in `<answer>`, else all that follows the reasoning.

    Raises:
        ImportError: a name, and reasoning-gym is not installed.

    >>> reward = from_reasoning_gym(lambda answer, entry: float(answer == entry["answer"]))
    >>> reward(completion="<think>hm</think><answer>4</answer>", prompt="2 + 2?", answer="4", metadata={})
    1.0
    """
    function = _reasoning_gym(score) if isinstance(score, str) else getattr(score, "score_answer", score)
    find = extract or _answer_text

    def reward(completion: str, prompt: Any, answer: Any = None, metadata: Any = None, question: Any = None) -> float:
        given = find(completion)
        entry = {"question": question or plain_prompt(prompt), "answer": answer, "metadata": metadata or {}}
        return float(function(given, entry))

    reward.__name__ = score if isinstance(score, str) else name_of(function)
    return reward


def _reasoning_gym(name: str) -> Callable[[Any, Any], float]:
    try:
        import reasoning_gym
    except ImportError:
        raise ImportError(f"the scorer of {name} wants reasoning-gym: `pip install leangrpo[tasks]`") from None
    return reasoning_gym.get_score_answer_fn(name)


def _answer_text(completion: str) -> str | None:
    region = after_think(completion)
    if region is None:
        return None
    return xml_tag(region, "answer") if "<answer>" in region else region.strip()


def _accepted(function: Callable[..., Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Of given arguments, those that `function` takes."""
    parameters = inspect.signature(function).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return dict
    return lambda given: {name: value for name, value in given.items() if name in parameters}


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _named(reward: Callable[..., Any], original: Any) -> Callable[..., Any]:
    """`reward` under the name of what it wraps; not functools.wraps, whose signature would be that one's."""
    reward.__name__ = name_of(original)
    return reward


def _note(value: Any) -> float | str | None:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _flat(values: Any) -> Any:
    """Tensors and arrays as lists; a number as a list of one."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return values if isinstance(values, list | tuple) else [values]
