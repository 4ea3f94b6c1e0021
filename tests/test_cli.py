"""The command as a user meets it: what it prints, what it leaves, how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import transformers
import yaml

from grpo.cli import main
from tests.tiny import tiny_model, tokenizer

REWARDS = """
import time
def length(completion, answer):
    return len(completion) % 4 / 3
def digits(completions, **columns):
    return [float(sum(c.isdigit() for c in text)) for text in completions]
def raises(completion):
    raise ValueError("boom\\nsecond line")
def short(completions, **columns):
    return [1.0] * (len(completions) - 1)
def text(completion):
    return "good"
def nan(completion):
    return float("nan")
def needs(completion, solution):
    return 1.0
def slow(completion):
    time.sleep(0.05)
    return float(len(completion) % 3)
def late(completion, trainer_state):
    if trainer_state.global_step >= 2:
        raise RuntimeError("judge is down")
    return float(len(completion) % 3)
not_a_function = 3
"""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    text = tokenizer()
    tiny_model(vocab_size=len(text)).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


@pytest.fixture
def home(tmp_path, model_folder, monkeypatch):
    """An empty folder with a dataset, rewards and a configuration, as a user would have it."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"sort {n}", "answer": str(n)} for n in (31, 42, 27, 995, 8, 70)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft_rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in rows]
    Path("sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sft_rows))
    Path("rewards_of_mine.py").write_text(REWARDS)
    config = {
        "output_dir": "run",
        "max_steps": 3,
        "prompts_per_step": 2,
        "model": {"name_or_path": str(model_folder), "dtype": "float32", "device": "cpu"},
        "data": {"train": "train.jsonl"},
        "rewards": [{"function": "rewards_of_mine.py:length"}, {"function": "rewards_of_mine:digits", "weight": 0.5}],
        "rollout": {"num_generations": 4, "max_completion_length": 6},
        "optimizer": {"learning_rate": 0.01},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def run(*arguments, capsys=None):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


KEYS = """step loss reward reward_std frac_reward_zero_std rewards/length/mean rewards/length/std rewards/digits/mean
completions/mean_length completions/max_length completions/clipped_ratio kl entropy grad_norm learning_rate num_tokens
tokens_per_second step_time phase/rollout/seconds phase/rollout/peak_gib phase/update/seconds phase/update/peak_gib""".split()


def test_train_leaves_the_documented_run_folder(home, capsys):
    code, out, err = run("train", "config.yaml", "data.eval=train.jsonl", "evaluation.every_steps=2", capsys=capsys)
    assert code == 0, err
    folder = home / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(KEYS) <= set(row), set(KEYS) - set(row)
    assert "initial_eval_accuracy" in rows[0] and "eval_accuracy" in rows[1] and "eval_accuracy" in rows[2]
    assert yaml.safe_load((folder / "config.yaml").read_text())["objective"]["recipe"] == "dapo"
    assert json.loads((folder / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    table = pyarrow.parquet.read_table(folder / "rollouts" / "step_000003.parquet").to_pylist()
    assert len(table) == 8
    assert rows[2]["reward"] == pytest.approx(sum(row["reward"] for row in table) / 8)
    for row in table:
        assert row["reward"] == pytest.approx(row["reward/length"] + 0.5 * row["reward/digits"])
        assert row["reward/digits"] == sum(c.isdigit() for c in row["completion"])
    report = (folder / "report.html").read_text()
    assert "<html" in report and "http" not in report.split("</style>")[-1].replace("http-equiv", "")
    assert (folder / "checkpoints" / "step_000003" / "MANIFEST.json").is_file()
    assert (folder / "model" / "model.safetensors").is_file()
    assert "sample 1" in out and "report.html" in out


def test_dry_run_prints_what_would_run_and_touches_nothing(home, capsys):
    code, out, _ = run("train", "config.yaml", "optimizer.learning_rate=5e-7", "--dry-run", capsys=capsys)
    assert code == 0
    resolved = yaml.safe_load(out)
    assert resolved["optimizer"]["learning_rate"] == 5e-7
    assert resolved["objective"]["delta"] == 3.0
    assert not (home / "run").exists()


def test_lora_then_resume_then_evaluate(home, capsys):
    code, _, err = run("train", "config.yaml", "adapter.r=4", "max_steps=2", capsys=capsys)
    assert code == 0, err
    code, _, err = run("train", "config.yaml", "adapter.r=4", "max_steps=2", capsys=capsys)
    assert code == 2 and err.startswith("run: holds a run (want --resume") and err.count("\n") == 1
    code, out, err = run(
        "train", "config.yaml", "adapter.r=4", "max_steps=4", "--resume", "--allow-change", "max_steps", capsys=capsys
    )
    assert code == 0, err
    assert "resumed at step 2 of 4" in out
    assert len((home / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    code, out, err = run(
        "evaluate", "config.yaml", "data.eval=train.jsonl", "evaluation.num_generations=4", "evaluation.temperature=1",
        "evaluation.pass_threshold=0.5", "--model", "run/model", "--json", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    metrics = json.loads(out.splitlines()[-1])
    assert metrics["eval_mean@1"] <= metrics["eval_pass@2"] <= metrics["eval_pass@4"]


def test_sft_learns_its_completions(home, capsys):
    Path("sft.yaml").write_text(
        yaml.safe_dump(
            {
                "output_dir": "sft",
                "max_steps": 60,
                "examples_per_step": 6,
                "model": yaml.safe_load(Path("config.yaml").read_text())["model"],
                "data": {"train": "sft.jsonl", "eval": "sft.jsonl"},
                "optimizer": {"learning_rate": 0.01},
            }
        )
    )
    code, _, err = run("sft", "sft.yaml", capsys=capsys)
    assert code == 0, err
    rows = [json.loads(line) for line in (home / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.1 < rows[0]["loss"]
    assert rows[-1]["eval_loss"] < 0.1
    assert rows[0]["initial_eval_loss"] == pytest.approx(rows[0]["loss"], rel=1e-3)  # all rows in each step
    text = tokenizer()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("sft/model")
    ids = model.generate(**text("sort 995", return_tensors="pt"), do_sample=False, max_new_tokens=6)
    assert text.decode(ids[0]).endswith("995<|end|>")


BAD = {
    "unknown key": (["update.learning_rte=1"], "config.yaml: update.learning_rte is unknown (did you mean optimizer.learning_rate?)"),
    "mistyped value": (["rollout.num_generations=many"], "config.yaml: rollout.num_generations is 'many' (want a whole number)"),
    "group of one": (["rollout.num_generations=1"], "config.yaml: rollout.num_generations is 1 (want at least 2)"),
    "no steps": (["max_steps=0"], "config.yaml: max_steps is 0 (want at least 1)"),
    "longer than the context": (["rollout.max_completion_length=256"], "rollout.max_completion_length is 256 (want less than the model's context of 256 tokens)"),
    "prompt beyond what is left": (["rollout.max_completion_length=250"], "train.jsonl: row 1: prompt has 7 tokens (want at most 6"),
    "missing data file": (["data.train=nowhere.jsonl"], "data.train is 'nowhere.jsonl': no such file"),
    "no data": (["data.train=null"], "data.train is null (want a path, a hub id"),
    "missing model": (["model.name_or_path=./nowhere"], "model.name_or_path is './nowhere': no such folder"),
    "no model": (["model.name_or_path=''"], "model.name_or_path is missing (want a folder or a hub id)"),
    "folder without a model": (["model.name_or_path=."], "model.name_or_path is '.'"),
    "no prompt column": (["data.prompt_column=question"], "train.jsonl: no column 'question' (columns: prompt, answer; see data.prompt_column)"),
    "no rewards": (["rewards=[]"], "rewards is empty (want at least one function"),
    "reward file missing": (["rewards=[nowhere.py:f]"], 'rewards[0] "nowhere.py:f"'),
    "reward module missing": (["rewards=[no_such_module_here:f]"], 'rewards[0] "no_such_module_here:f"'),
    "reward function missing": (["rewards=[rewards_of_mine.py:lenght]"], 'rewards[0] "rewards_of_mine.py:lenght"'),
    "reward not callable": (["rewards=[rewards_of_mine.py:not_a_function]"], 'rewards[0] "rewards_of_mine.py:not_a_function"'),
    "reward needs a column that is not there": (["rewards=[rewards_of_mine.py:needs]"], 'rewards[0] "rewards_of_mine.py:needs"'),
    "adapter matches nothing": (["adapter.target_modules=[nothing]"], "adapter.target_modules"),
    "4-bit weights without an adapter": (["model.load_in_4bit=true"], "config.yaml: model.load_in_4bit is true (want an adapter section"),
    "4-bit weights that a CPU decodes wrongly": (["model.load_in_4bit=true", "adapter.r=4"], "model.load_in_4bit is true on the CPU, where widths"),
    "paged optimizer on a CPU": (["optimizer.name=paged_adamw"], "config.yaml: optimizer.name is 'paged_adamw' with model.device 'cpu' (want adamw: paged"),
    "tiled MLP without an adapter": (["update.tiled_mlp=true"], "config.yaml: update.tiled_mlp is true (want an adapter section"),
    "tiled MLP unfused": (["update.tiled_mlp=true", "update.fused_kernels=false", "adapter.r=4"], "config.yaml: update.tiled_mlp is true (want update.fused_kernels: auto"),
    "tiled MLP with dropout": (["update.tiled_mlp=true", "adapter.dropout=0.1"], "config.yaml: update.tiled_mlp is true beside adapter.dropout = 0.1"),
    "no such device": (["model.device=quantum"], "model.device is 'quantum'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(home, case, capsys):
    overrides, wanted = BAD[case]
    code, out, err = run("train", "config.yaml", *overrides, capsys=capsys)
    assert code == 2
    assert err.splitlines()[0].startswith(wanted), err
    assert "Traceback" not in err + out
    assert not (home / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to page from")
def test_a_paged_optimizer_without_a_gpu_is_refused(home, capsys):
    code, out, err = run("train", "config.yaml", "optimizer.name=paged_adamw_8bit", "model.device=auto", capsys=capsys)
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err + out
    assert err.startswith("optimizer.name is 'paged_adamw_8bit' (want adamw_8bit: paged state needs CUDA")
    assert not (home / "run").exists()


def test_a_mixture_of_experts_in_4bit_is_refused_before_its_weights(home, capsys):
    text = tokenizer()
    text.save_pretrained("mixture")
    transformers.MixtralConfig(vocab_size=len(text), num_local_experts=4).save_pretrained("mixture")  # and no weights
    code, out, err = run(
        "train", "config.yaml", "model.name_or_path=mixture", "model.load_in_4bit=true", "adapter.r=4", capsys=capsys
    )
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err + out
    assert err.startswith("model.load_in_4bit is true on a mixture of 4 experts") and "want bf16 LoRA" in err
    assert not (home / "run").exists()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", "train.jsonl: has no rows"),
        ('{"prompt": "a"}\n{"prompt": null}\n', "train.jsonl: row 2: prompt is null (want text or a list of messages)"),
        ('{"prompt": "a"}\n{oops\n', "train.jsonl: row 2: not valid JSON"),
    ],
)
def test_bad_rows_end_before_any_weight_is_loaded(home, content, wanted, capsys, monkeypatch):
    Path("train.jsonl").write_text(content)
    import grpo.trainer.build as build

    monkeypatch.setattr(build, "load_model", lambda *_: pytest.fail("weights were loaded"))
    code, _, err = run("train", "config.yaml", "rewards=[rewards_of_mine.py:digits]", capsys=capsys)
    assert code == 2 and err.startswith(wanted) and err.count("\n") == 1


RUNTIME = {
    "raises": 'rewards[0] "rewards_of_mine.py:raises": raised ValueError: boom',
    "short": 'rewards[0] "rewards_of_mine.py:short": returned 7 values for 8 completions',
    "text": 'rewards[0] "rewards_of_mine.py:text":',
    "nan": 'rewards[0] "rewards_of_mine.py:nan":',
    "late": 'rewards[0] "rewards_of_mine.py:late": raised RuntimeError: judge is down',
}


@pytest.mark.parametrize("name", RUNTIME)
def test_a_bad_reward_ends_the_run_saved(home, name, capsys):
    code, out, err = run("train", "config.yaml", f"rewards=[rewards_of_mine.py:{name}]", capsys=capsys)
    assert code == 1
    assert err.startswith(RUNTIME[name]), err
    assert err.count("\n") == 1 and "Traceback" not in err + out
    checkpoints = [path.name for path in (home / "run" / "checkpoints").iterdir()]
    assert checkpoints == (["step_000002"] if name == "late" else ["step_000000"])
    if name == "late":  # mend the judge, go on
        Path("rewards_of_mine.py").write_text(REWARDS.replace('raise RuntimeError("judge is down")', "pass"))
        code, out, err = run("train", "config.yaml", f"rewards=[rewards_of_mine.py:{name}]", "--resume", capsys=capsys)
        assert code == 0, err
        assert [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_on_error_none_leaves_those_completions_out(home, capsys):
    Path("rewards_of_mine.py").write_text(
        "def sometimes(completion, answer):\n"
        "    if answer == '31':\n        raise ValueError('boom')\n"
        "    return float(len(completion) % 3)\n"
    )
    code, _, err = run(
        "train", "config.yaml", "rewards=[rewards_of_mine.py:sometimes]", "rewards.on_error=none", "prompts_per_step=6",
        "max_steps=1", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    table = pyarrow.parquet.read_table("run/rollouts/step_000001.parquet").to_pylist()
    assert {row["reward"] is None for row in table if "31" in row["prompt"]} == {True}
    assert all(row["reward"] is not None and row["advantage"] is not None for row in table if "31" not in row["prompt"])


def test_debug_shows_the_traceback(home):
    done = subprocess.run(
        [sys.executable, "-m", "grpo", "train", "config.yaml", "max_steps=0", "--debug"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode != 0 and "Traceback" in done.stderr and "max_steps is 0" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_at_a_step_boundary_and_exits_75(home, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo", "train", "config.yaml", "rewards=[rewards_of_mine.py:slow]", "max_steps=500"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = home / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    steps = metrics.read_text().count("\n")
    assert f"stopped at step {steps}, saved; go on with --resume" in out
    assert (home / "run" / "checkpoints" / f"step_{steps:06d}").is_dir()


def test_help_is_instant_and_imports_no_torch():
    code = "import sys, grpo.cli\ntry:\n grpo.cli.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout and "evaluate" in done.stdout


def test_a_tracker_is_an_addition_and_its_loss_ends_nothing(home, capsys, monkeypatch):
    import wandb

    seen = []

    class Tracker:
        def log(self, row, step):
            seen.append((step, row["reward"]))
            if step == 2:
                raise wandb.errors.CommError("network is down")

        def finish(self):
            seen.append("finished")

    monkeypatch.setattr(wandb, "init", lambda **_: Tracker())
    code, out, err = run("train", "config.yaml", "logging.trackers=[wandb]", capsys=capsys)
    assert code == 0, err
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert seen == [(1, rows[0]["reward"]), (2, rows[1]["reward"])]
    assert out.count("tracker stopped, the run goes on without it: network is down") == 1
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_plan_prints_phases_and_ends_with_the_verdict(home, capsys):
    code, out, _ = run("plan", "config.yaml", "--gpu", "24GB", capsys=capsys)
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    for phase in ("load", "rollout", "score", "forward", "backward", "optimizer", "save"):
        assert any(line.startswith(f"{phase} ") for line in lines), phase
    assert any(line.startswith("fits: peak") and "22.35 GiB" in line for line in lines)
    assert not Path("run").exists()


def test_a_plan_that_does_not_fit_names_the_smallest_change(home, capsys):
    arguments = ["rollout.max_completion_length=100000", "rollout.max_sequences=8", "--gpu", "1GB"]
    code, out, _ = run("plan", "config.yaml", *arguments, capsys=capsys)
    assert code == 1
    assert "does not fit: peak" in out
    change = out.partition("smallest change that fits: ")[2].rpartition(" (")[0].split()
    assert change
    code, out, _ = run("plan", "config.yaml", *arguments[:2], *change, *arguments[2:], capsys=capsys)
    assert code == 0, out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gpu", "big"], "gpu: 'big' is no size of memory"),
        (["--gpu", "100MB"], "gpu: 95 MiB is less than a CUDA context takes"),
        (["model.name_or_path=./nowhere"], "model.name_or_path is './nowhere': no such folder"),
        (
            ["update.max_tokens_per_batch=most"],
            "max_tokens_per_batch is 'most' (want a whole number, at least 1, or auto)",
        ),
        (["update.max_tokens_per_batch=0"], "max_tokens_per_batch is 0 (want a whole number, at least 1, or auto)"),
    ],
)
def test_bad_input_of_a_plan_is_one_line(home, capsys, arguments, line):
    code, _, err = run("plan", "config.yaml", *arguments, capsys=capsys)
    assert code == 2
    assert line in err
    assert len(err.strip().splitlines()) == 1


def test_a_plan_without_a_gpu_has_no_verdict(home, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, out, _ = run("plan", "config.yaml", "update.max_tokens_per_batch=auto", capsys=capsys)
    assert code == 0
    assert "no GPU here: pass --gpu SIZE for a verdict" in out
    assert "fit:" not in out
    assert "bins of" in out


def test_auto_bins_are_a_number_in_the_run_and_auto_in_its_configuration(home, capsys):
    code, out, _ = run("train", "config.yaml", "update.max_tokens_per_batch=auto", "max_steps=1", capsys=capsys)
    assert code == 0
    if not torch.cuda.is_available():
        assert "update.max_tokens_per_batch: auto is 16,384 tokens" in out
    assert yaml.safe_load(Path("run/config.yaml").read_text())["update"]["max_tokens_per_batch"] == "auto"


def test_bench_prints_its_figures_and_writes_them(tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    code, text, err = run("bench", "--model", "toy", "--tokens", "32", "--device", "cpu", "--out", out, capsys=capsys)
    assert code == 0, err
    found = json.loads(out.read_text())
    (row,) = found["methods"][0]["rows"]
    assert row["tokens"] == 32 and row["seconds"] > 0
    assert "toy, lora" in text and "ours, offload, tiled MLP" in text and f"{row['tokens_per_s']:,.0f} tokens/s" in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", "gpt-9"], "model 'gpt-9' is no known shape (want qwen2.5-0.5b, "),
        (["--gpu", "24XB"], "gpu is '24XB': it is no size of memory (want one like 24GB or 512MiB)"),
        (["--model", "qwen3-1.7b"], "nothing to search on cpu: memory has no cap there"),
    ],
)
def test_bad_input_of_a_benchmark_is_one_line(capsys, arguments, line):
    code, _, err = run("bench", "--device", "cpu", "--tokens" if "gpt-9" in arguments else "--budget", "64", *arguments,
                       capsys=capsys)  # fmt: skip
    assert code == 2 and line in err and err.count("\n") == 1
