"""Rows in, prompts out; every bad row is named."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from grpo.config import DataConfig
from grpo.data import PromptStream, build_prompts, load_table
from grpo.errors import InputError
from grpo.seeds import permutation
from tests.tiny import tokenizer

ROWS = [
    {"prompt": "sort 31", "answer": "13"},
    {"prompt": "sort 42", "answer": "24"},
    {"prompt": "sort 9", "answer": "9"},
]


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts_of(rows, **config):
    return build_prompts(load_table(rows, "data.train"), tokenizer(), DataConfig(**config), field="data.train")


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    table = load_table(write(tmp_path / name, ROWS), "data.train")
    assert [dict(row) for row in table.rows] == ROWS


def test_objects_and_saved_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    assert [dict(row) for row in load_table(dataset, "data.train").rows] == ROWS
    dataset.save_to_disk(tmp_path / "saved")
    assert [dict(row) for row in load_table(str(tmp_path / "saved"), "data.train").rows] == ROWS
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "both")
    assert [row["answer"] for row in load_table(str(tmp_path / "both"), "data.eval", "test").rows] == ["24"]


def test_text_is_encoded_as_it_stands_and_messages_by_the_template():
    text = tokenizer()
    (plain, chat, with_system), _ = build_prompts(
        load_table(
            [
                {"prompt": "sort 31"},
                {"prompt": [{"role": "user", "content": "sort 31"}]},
                {"prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "sort 31"}]},
            ],
            "data.train",
        ),
        text,
        DataConfig(),
        field="data.train",
    )
    assert text.decode(plain.token_ids) == "sort 31"
    assert text.decode(chat.token_ids) == "<|user|>sort 31<|end|><|assistant|>"
    assert text.decode(with_system.token_ids).endswith("be brief<|end|><|user|>sort 31<|end|><|assistant|>")


def test_a_system_prompt_goes_in_front_once():
    rows = [{"prompt": "a"}, {"prompt": [{"role": "system", "content": "own"}, {"role": "user", "content": "b"}]}]
    first, second = prompts_of(rows, system_prompt="be brief")[0]
    assert first.example["prompt"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]
    assert second.example["prompt"][0]["content"] == "own"


def test_other_columns_reach_the_example():
    (prompt, *_), _ = prompts_of(ROWS)
    assert dict(prompt.example) == ROWS[0] and prompt.id == 0


def lines(call):
    with pytest.raises(InputError) as error:
        call()
    return error.value.lines


BAD_PROMPTS = [
    (None, "prompt is null (want text or a list of messages)"),
    ("", "prompt is empty (want text or a list of messages)"),
    ([], "prompt is empty (want text or a list of messages)"),
    (7, "prompt is int (want text or a list of messages)"),
    (["hello"], "prompt message 1 has no role (want {role, content})"),
    ([{"role": "user"}], "prompt message 1 has no text content (want {role, content})"),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": None}], "prompt message 2 has no text content"),
]


@pytest.mark.parametrize(("value", "problem"), BAD_PROMPTS)
def test_bad_prompts_name_file_and_row(tmp_path, value, problem):
    path = write(tmp_path / "train.jsonl", [ROWS[0], {"prompt": value}])
    (line,) = lines(lambda: prompts_of(path))
    assert line.startswith(f"{path}: row 2: {problem}")


def test_bad_rows_are_all_named_up_to_ten():
    rows = [{"prompt": None}] * 12 + ROWS
    with pytest.raises(InputError) as error:
        prompts_of(rows)
    assert len(error.value.lines) == 12
    assert str(error.value).splitlines()[-1] == "and 2 more"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ', "a.jsonl: row 2: not valid JSON"),
        ("a.jsonl", '"just text"\n', "a.jsonl: row 1: is str (want an object with columns)"),
        ("a.jsonl", "", "a.jsonl: has no rows"),
        ("a.json", "{}", "a.json: holds dict (want a list of objects)"),
        ("a.json", "[1,", "a.json: line 1: not valid JSON"),
        ("a.csv", "prompt,answer\nx,1\ny\n", "a.csv: row 2: has not as many fields as the header"),
        ("a.csv", "prompt\n", "a.csv: has no rows"),
        ("a.parquet", "nonsense", "a.parquet: not a readable Parquet file"),
        ("a.txt", "x", "a file of an unknown kind (want .jsonl"),
        ("a.jsonl", '{"question": "x"}', "a.jsonl: no column 'prompt' (columns: question; see data.prompt_column)"),
    ],
)
def test_bad_files(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    (line,) = lines(lambda: prompts_of(str(tmp_path / name)))
    assert problem in line


def test_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    assert "a.jsonl: not UTF-8 text (byte 12)" in lines(lambda: prompts_of(str(tmp_path / "a.jsonl")))[0]


def test_missing_file_and_wrong_kind():
    assert lines(lambda: load_table("nowhere.jsonl", "data.train")) == ["data.train is 'nowhere.jsonl': no such file"]
    assert "(want a path, a hub id, a Dataset or a list of dicts)" in lines(lambda: load_table(7, "train_dataset"))[0]
    assert lines(lambda: load_table([], "train_dataset")) == ["train_dataset: has no rows"]


def test_long_prompts_are_an_error_or_dropped_and_said():
    rows = [*ROWS, {"prompt": "sort " + "1" * 40}]
    (line,) = lines(lambda: prompts_of(rows, max_prompt_length=20))
    assert line == "data.train: row 4: prompt has 45 tokens (want at most 20: data.max_prompt_length)"
    prompts, notes = prompts_of(rows, max_prompt_length=20, overlong_prompt="drop")
    assert [prompt.id for prompt in prompts] == [0, 1, 2]
    assert notes == ["data.train: 1 of 4 prompts dropped (longer than 20 tokens)"]
    assert "no prompt is left" in lines(lambda: prompts_of(rows, max_prompt_length=1, overlong_prompt="drop"))[0]


def test_what_the_context_leaves_is_a_limit_too():
    table = load_table(ROWS, "data.train")
    (line, *_) = lines(lambda: build_prompts(table, tokenizer(), DataConfig(), field="data.train", room=6))
    assert line == "data.train: row 1: prompt has 7 tokens (want at most 6: what the model's context leaves)"


def test_messages_without_a_template():
    text = tokenizer()
    text.chat_template = None
    table = load_table([{"prompt": [{"role": "user", "content": "x"}]}], "data.train")
    (line,) = lines(lambda: build_prompts(table, text, DataConfig(), field="data.train"))
    assert "row 1: prompt is chat messages, but the tokenizer has no chat template" in line


def test_the_stream_is_a_permutation_per_epoch_and_resumes_anywhere():
    prompts, _ = prompts_of([{"prompt": str(n)} for n in range(10, 17)])
    whole = [(p.epoch, p.id) for p in PromptStream(prompts, seed=3).take(25)]
    assert whole == [(n // 7, permutation(7, 3, n // 7)[n % 7]) for n in range(25)]
    for cut in range(25):
        first = PromptStream(prompts, seed=3)
        head = first.take(cut)
        tail = PromptStream(prompts, seed=3, consumed=first.consumed).take(25 - cut)
        assert [(p.epoch, p.id) for p in head + tail] == whole
    assert [p.id for p in PromptStream(prompts, seed=3, shuffle=False).take(8)] == [0, 1, 2, 3, 4, 5, 6, 0]


def test_generated_tasks_are_data_by_name():
    from rewards.tasks import make

    table = load_table("tasks:sorting?count=5&seed=3&difficulty=2", "data.train")
    assert list(table.rows) == make("sorting", 5, seed=3, difficulty=2)


@pytest.mark.parametrize("uri", ["tasks:nothing", "tasks:sorting?size=3", "tasks:sorting?count=many"])
def test_a_task_that_does_not_exist_is_one_line(uri):
    with pytest.raises(InputError, match="data.train: ") as error:
        load_table(uri, "data.train")
    assert len(error.value.lines) == 1
