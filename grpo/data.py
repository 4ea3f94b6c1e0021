"""Dataset → prompts, checked row by row before any weight is loaded, and a stream of them with a cursor.

A row is a mapping with a prompt column (text, or chat messages) and any other columns, which reach the reward
functions under their own names. Text is encoded as it stands; messages go through the tokenizer's chat template.
Left out: streaming datasets. Prompts are small; all of them are encoded at start, so that a bad row is found then.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.batch import Prompt
from grpo.config import DataConfig
from grpo.errors import InputError, clip
from grpo.seeds import permutation

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Table:
    """Rows and the name they are called by in messages."""

    name: str
    rows: Rows


def load_table(source: Any, field: str, split: str = "train") -> Table:
    """Rows of a local file, a folder saved by `datasets`, a hub id, a `datasets.Dataset` or a list of dicts.

    Args:
        source: what the user gave.
        field: its place in the configuration, for messages ("data.train").
        split: of a hub dataset; "id:split" in `source` wins.

    Raises:
        InputError: missing or malformed file, unknown hub id, no rows, naming the file and row.
    """
    if isinstance(source, str | Path):
        table = Table(str(source), _read(str(source), field, split))
    elif isinstance(source, Sequence) or (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        table = Table(field, source)
    else:
        raise InputError(f"{field} is {type(source).__name__} (want a path, a hub id, a Dataset or a list of dicts)")
    if len(table.rows) == 0:
        raise InputError(f"{table.name}: has no rows")
    for number, row in enumerate(table.rows, 1):
        if not isinstance(row, Mapping):
            raise InputError(f"{table.name}: row {number}: is {type(row).__name__} (want an object with columns)")
    return table


def _read(source: str, field: str, split: str) -> Rows:
    if source.startswith("tasks:"):  # problems made on the spot
        from rewards.tasks import from_uri

        try:
            return from_uri(source)
        except ValueError as error:
            raise InputError(f"{field}: {error}") from None
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in _SUFFIXES:
        reader = {".csv": _read_csv, ".parquet": _read_parquet, ".json": _read_json}.get(path.suffix, _read_jsonl)
        return reader(path)
    if path.is_dir():
        from datasets import DatasetDict, load_from_disk

        try:
            saved = load_from_disk(str(path))
        except (FileNotFoundError, ValueError) as error:
            raise InputError(f"{field} is {source!r}: not a saved dataset: {clip(error)}") from None
        return saved[split] if isinstance(saved, DatasetDict) else saved
    if path.suffix in _SUFFIXES or path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        what = f"a file of an unknown kind (want {', '.join(_SUFFIXES)})" if path.exists() else "no such file"
        raise InputError(f"{field} is {source!r}: {what}")
    return _read_hub(source, field, split)


def _read_hub(source: str, field: str, split: str) -> Rows:
    from datasets import load_dataset

    name, _, rest = source.partition(":")
    subset, _, given_split = rest.rpartition(":")
    try:
        return load_dataset(name, subset or None, split=given_split or split)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{field} is {source!r}: neither a local file nor a readable hub dataset (id, id:split or "
            f"id:subset:split): {clip(error, 120)}"
        ) from None


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _read_jsonl(path: Path) -> Rows:
    rows = []
    for number, line in enumerate(_text_of(path).splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}: row {number}: not valid JSON: {error.msg}") from None
    return rows


def _read_json(path: Path) -> Rows:
    try:
        rows = json.loads(_text_of(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: holds {type(rows).__name__} (want a list of objects)")
    return rows


def _read_csv(path: Path) -> Rows:
    rows = []
    reader = csv.DictReader(_text_of(path).splitlines(keepends=True), strict=True)
    try:
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise InputError(f"{path}: row {number}: has not as many fields as the header")
            rows.append(row)
    except csv.Error as error:
        raise InputError(f"{path}: row {len(rows) + 1}: not valid CSV: {error}") from None
    return rows


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {clip(error)}") from None


# --- rows → prompts ------------------------------------------------------------------------------------------


def check_column(table: Table, column: str, field: str) -> None:
    """Raise `InputError` when no row has `column`, naming the columns there are."""
    columns = list(dict.fromkeys(name for row in table.rows for name in row))
    if column not in columns:
        raise InputError(f"{table.name}: no column {column!r} (columns: {', '.join(columns) or 'none'}; see {field})")


def prompt_problem(value: Any) -> str | None:
    """What is wrong with a prompt: None when it is non-empty text or a list of chat messages."""
    if isinstance(value, str | list | tuple) and value:
        return None if isinstance(value, str) else _message_problem(value)
    what = "null" if value is None else "empty" if isinstance(value, str | list | tuple) else type(value).__name__
    return f"is {what} (want text or a list of messages)"


def _message_problem(messages: Sequence[Any]) -> str | None:
    for place, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"message {place} has no role (want {{role, content}})"
        if not isinstance(message.get("content"), str):
            return f"message {place} has no text content (want {{role, content}})"
    return None


def with_system(prompt: Any, system_prompt: str | None) -> Any:
    """`prompt` with the system message in front; text becomes a user message then."""
    if system_prompt is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def prompt_text(prompt: Any) -> str:
    """A prompt for people to read: text as it is, messages as `role: content` lines."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def encode_prompt(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of text (as it stands) or of messages (chat template, ready for the assistant's answer)."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(
        tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False)
    )


def build_prompts(
    table: Table, tokenizer: Any, config: DataConfig, *, field: str, room: int | None = None
) -> tuple[list[Prompt], list[str]]:
    """Check and encode every row.

    Args:
        table: the rows.
        tokenizer: a Hugging Face tokenizer.
        config: column, system prompt, length limit and what to do beyond it.
        field: "data.train" or "data.eval", for messages.
        room: tokens that the model's context leaves for a prompt, None when it states no limit.

    Returns:
        prompts (`id` = row from 0, `example["prompt"]` = the prompt as the model sees it) and notes to print.

    Raises:
        InputError: one line for each bad row (rows count from 1).
    """
    check_column(table, config.prompt_column, "data.prompt_column")
    limit = config.max_prompt_length if room is None else min(config.max_prompt_length, room)
    why = "data.max_prompt_length" if limit == config.max_prompt_length else "what the model's context leaves"
    prompts, problems, overlong = [], [], []
    for index, row in enumerate(table.rows):
        where = f"{table.name}: row {index + 1}: {config.prompt_column}"
        value = row.get(config.prompt_column)
        if problem := prompt_problem(value):
            problems.append(f"{where} {problem}")
            continue
        prompt = with_system(value, config.system_prompt)
        if not isinstance(prompt, str) and not getattr(tokenizer, "chat_template", None):
            raise InputError(f"{where} is chat messages, but the tokenizer has no chat template")
        ids = encode_prompt(tokenizer, prompt)
        if not ids:
            problems.append(f"{where} has no tokens")
        elif len(ids) > limit:
            overlong.append(f"{where} has {len(ids)} tokens (want at most {limit}: {why})")
        else:
            prompts.append(Prompt(index, ids, {**row, "prompt": prompt}))
    notes = []
    if overlong and config.overlong_prompt == "drop":
        notes.append(f"{table.name}: {len(overlong)} of {len(table.rows)} prompts dropped (longer than {limit} tokens)")
    else:
        problems += overlong
    if problems:
        raise InputError(*problems)
    if not prompts:
        raise InputError(f"{table.name}: no prompt is left ({field}: all are longer than {limit} tokens)")
    return prompts, notes


class PromptStream:
    """Prompts in a new order each epoch. The cursor is one number: how many have been consumed.

    The order of an epoch is f(seed, epoch), so a resumed stream goes on exactly, in any epoch.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True, consumed: int = 0) -> None:
        self.prompts = prompts
        self.seed = seed
        self.shuffle = shuffle
        self.consumed = consumed
        self._order: tuple[int, list[int]] | None = None

    @property
    def epoch(self) -> float:
        """Epochs consumed, with their fraction."""
        return self.consumed / len(self.prompts)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts, going on into the next epoch where one ends."""
        return [next(self) for _ in range(count)]

    def __iter__(self) -> Iterator[Prompt]:
        return self

    def __next__(self) -> Prompt:
        epoch, place = divmod(self.consumed, len(self.prompts))
        if self._order is None or self._order[0] != epoch:
            size = len(self.prompts)
            self._order = (epoch, permutation(size, self.seed, epoch) if self.shuffle else list(range(size)))
        self.consumed += 1
        prompt = self.prompts[self._order[1][place]]
        return Prompt(prompt.id, prompt.token_ids, prompt.example, epoch)
