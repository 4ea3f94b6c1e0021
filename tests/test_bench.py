"""The benchmark: the search against made-up cards, FLOPs against torch's counter, and real steps at toy size."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grpo import bench, bench_try
from grpo.bench import PLAIN, WAYS, at_lengths, benchmark, find_longest, gradient_errors
from grpo.bench_card import Card, Rate, model_flops
from grpo.bench_models import SHAPES, Case, build, model_config, quantise, random_model
from grpo.bench_search import PRECISION, Search
from grpo.bench_step import Data
from grpo.bench_table import COLUMNS, result_rows
from grpo.bench_try import attempt_here
from grpo.errors import InputError, RunError
from grpo.model.adapter import base_of

CPU = torch.device("cpu")
TOY = Case("toy", "toy", 1, 64, 64, rank=4)
RECOMPUTE = WAYS[0]


# --- the search, on a card and a clock that are formulas -------------------------------------------------------------


class Made:
    """peak = c + m·T up to a true limit; seconds = a·T + b·T²; failing tries cost time too."""

    def __init__(self, limit, c=5.0, m=2e-4, a=1e-4, b=0.0):
        self.limit, self.c, self.m, self.a, self.b = limit, c, m, a, b
        self.now, self.tried = 0.0, []

    def attempt(self, tokens):
        self.tried.append(tokens)
        seconds = self.a * tokens + self.b * tokens**2
        self.now += seconds + 2
        row = {"tokens": tokens, "wall_s": seconds + 2}
        if tokens > self.limit:
            return row | {"failed": "CUDA out of memory"}
        return row | {"seconds": seconds, "peak_gib": self.c + self.m * tokens}

    def search(self, capacity, probes=(4096, 8192), budget=1e9, most=2**20, **other):
        found = Search(capacity, budget, most, **other)
        found.run(self.attempt, probes, lambda: self.now)
        return found


@pytest.mark.parametrize("slack", [1.0, 0.99, 0.97, 0.93, 0.85, 1.04])
def test_few_tries_find_the_longest(slack):
    """Also where the allocator loses a part of the card, or the line of the probes is too steep."""
    bound = (22.35 - 5.0) / 2e-4
    made = Made(slack * bound)
    found = made.search(22.35, max_tries=12)
    assert found.limited_by == "memory"
    assert found.longest <= made.limit < found.fails_at
    assert found.fails_at - found.longest <= max(512, PRECISION * found.longest)
    assert len(made.tried) <= 9 and len(set(made.tried)) == len(made.tried)
    if slack in (1.0, 0.99):
        assert len(made.tried) == 4  # two probes, the predicted one, one above
    assert all(tokens % 512 == 0 for tokens in made.tried)


def test_the_prediction_is_the_line_and_failing_rows_stay():
    made = Made(70_000)
    found = made.search(22.35)
    assert found.line() == pytest.approx((5.0, 2e-4))
    assert sum("failed" in row for row in found.rows) >= 1
    assert [row["tokens"] for row in found.rows] == made.tried


def test_time_is_foreseen_with_its_square():
    made = Made(10**9, a=1e-3, b=1e-8)
    found = made.search(22.35, budget=1e9, max_tries=2)
    assert found.limited_by == "tries"
    for tokens in (4096, 8192, 50_000, 300_000):
        wall = 1e-3 * tokens + 1e-8 * tokens**2
        assert wall <= found.expected_seconds(tokens) <= wall + 2 * max(1, tokens / 8192) + 1e-6


def test_no_try_outlasts_the_budget():
    made = Made(10**9, a=1e-3, b=1e-8)  # 300,000 tokens would take 20 minutes
    found = made.search(200.0, budget=300)
    assert found.limited_by == "budget" and found.fails_at is None
    assert made.now <= 300 and found.longest > 2 * 8192
    assert made.search(200.0, budget=1.0).longest == 8192  # the probes are always run


def test_a_line_far_too_flat_takes_growing_steps_down():
    made = Made(43_375)  # the line of the probes says 86,750
    found = made.search(22.35, max_tries=12)
    assert found.limited_by == "memory" and found.longest <= 43_375 < found.fails_at


def test_a_probe_that_fails_is_narrowed_down_without_a_prediction():
    made = Made(5000)
    found = made.search(6.0, probes=(4096, 8192), step=64, max_tries=20)
    assert found.limited_by == "memory" and found.longest <= 5000 < found.fails_at
    nothing = Made(0).search(1.0, probes=(4096, 8192), max_tries=20)
    assert nothing.longest is None and nothing.limited_by == "memory" and nothing.fails_at <= 512


def test_no_length_above_the_most():
    made = Made(10**9)
    found = made.search(1e6, most=20_000)
    assert found.limited_by == "most tokens" and found.longest == 20_000 == max(made.tried)


# --- models and arithmetic -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "millions"),
    [("qwen2.5-0.5b", 494), ("qwen3-1.7b", 1721), ("llama-3.2-3b", 3213), ("llama-3.1-8b", 8030), ("qwen3-14b", 14768)],
)
def test_shapes_are_those_published(shape, millions):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(shape), dtype=torch.bfloat16)
    model.tie_weights()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_random_weights_are_where_they_should_be():
    model = random_model("toy-qwen3", CPU, torch.float32, seed=1)
    again = random_model("toy-qwen3", CPU, torch.float32, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert float(model.model.embed_tokens.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert (model.model.norm.weight == 1).all()
    from transformers import Qwen3ForCausalLM

    wanted = Qwen3ForCausalLM(model_config("toy-qwen3")).model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, wanted)


def test_a_folder_gives_its_shape_and_no_weights_are_read(tmp_path):
    model_config("toy", architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    found = build(replace(TOY, shape=str(tmp_path)), CPU, torch.float32, num_hidden_layers=2)
    assert sum("q_proj.base_layer" in name for name, _ in found.named_parameters()) == 2
    with pytest.raises(InputError, match="'llama-9b' is no known shape"):
        model_config("llama-9b")


@pytest.mark.parametrize("rank", [0, 4])
def test_flops_are_what_torch_counts(rank):
    """Plain forward and backward on all tokens; torch counts a causal product in full, twice what is needed."""
    case = Case("toy", "toy", 1, 96, 96, rank=rank)
    model = build(case, CPU, torch.float32)
    if rank:
        model.enable_input_require_grads()  # else torch saves the first layer's input gradient
    base_of(model).set_attn_implementation("eager")  # what torch does on a CPU otherwise it does not count
    ids = torch.randint(0, 300, (1, case.length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    config = model_config("toy")
    not_scored = (4 if rank else 6) * config.vocab_size * config.hidden_size * (case.length - 48)
    upper_half = 6 * config.num_hidden_layers * config.hidden_size * case.length**2
    assert model_flops(model, case) + not_scored + upper_half == counter.get_total_flops()
    assert model_flops(model, replace(case, rows=8)) == 8 * model_flops(model, case)


# --- real steps ------------------------------------------------------------------------------------------------------


def test_rows_at_lengths_say_what_was_run():
    (entry,) = at_lengths(replace(TOY, rows=2), [RECOMPUTE], Card(CPU), [96, 64])
    assert [row["tokens"] for row in entry["rows"]] == [64, 96]
    for row in entry["rows"]:
        assert row["completion"] == row["tokens"] // 2
        assert row["tokens_per_s"] == pytest.approx(2 * row["tokens"] / row["seconds"], rel=0.01)
        assert row["peak_gib"] > 0.05 and row["gradient_norm"] > 0
    rows = result_rows({"methods": [entry], "gradient_errors": {}})
    assert [row[1] for row in rows] == ["32", "48"] and all(len(row) == len(COLUMNS) for row in rows)


class MadeCard(Card):
    """The CPU with a cap in GiB on a made-up peak: 1 + tokens / 100."""

    capacity_gib = 3.0

    def peaks(self):
        return {"peak_gib": 1 + self.tokens / 100}


@pytest.fixture
def card(monkeypatch):
    """Steps that end in torch's own error above 190 tokens."""
    made, original = MadeCard(CPU), bench_try._steps

    def steps(case, method, card, rate, files):
        card.tokens = case.length
        if case.length > 190:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.56 GiB\nmore")
        return original(case, method, card, rate, files)

    monkeypatch.setattr(bench_try, "_steps", steps)
    return made


def test_the_longest_is_found_with_real_steps(card):
    said = []
    (entry,) = find_longest(TOY, [RECOMPUTE], card, budget_s=600, probes=(32, 64), say=said.append)
    assert 160 <= entry["longest"] <= 190 < entry["fails_at"] and entry["limited_by"] == "memory"
    assert len(said) == len(entry["rows"]) <= 6
    (failed,) = [row for row in entry["rows"] if row["tokens"] == entry["fails_at"]]
    assert failed["failed"].startswith("CUDA out of memory. Tried to allocate 1.56 GiB")
    (cells,) = result_rows({"methods": [entry], "gradient_errors": {RECOMPUTE.name: 0.02}})
    assert cells[:4] == [RECOMPUTE.name, str(entry["longest"] // 2), str(failed["completion"]), "memory"]
    assert cells[-1] == "2.0e-02"


def test_without_budget_nothing_is_begun(card):
    (entry,) = find_longest(TOY, [RECOMPUTE], card, budget_s=0.0, probes=(32, 64))
    assert entry["rows"] == [] and "budget" in entry["skipped"]


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RunError("update.activation_checkpointing is offload: layer inputs need 9 GiB of host memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RunError("the gradient is not finite"), False),
    ],
)
def test_only_memory_that_ran_out_is_a_row(monkeypatch, error, failed):
    def steps(*_):
        raise error

    monkeypatch.setattr(bench_try, "_steps", steps)
    if failed:
        assert attempt_here(TOY, RECOMPUTE, Card(CPU), Rate(1e12))["failed"] == str(error)
    else:
        with pytest.raises(type(error), match=str(error)[:12]):
            attempt_here(TOY, RECOMPUTE, Card(CPU), Rate(1e12))


def test_a_gradient_that_is_not_finite_is_no_figure(monkeypatch):
    original = bench_try.ours

    def broken(policy, data):
        with torch.no_grad():
            next(iter(policy.trainable().values())).fill_(math.nan)
        return original(policy, data)

    monkeypatch.setattr(bench_try, "ours", broken)
    with pytest.raises(RunError, match="ours, recompute, 64 tokens: the gradient is not finite"):
        attempt_here(TOY, RECOMPUTE, Card(CPU), Rate(1e12))


@pytest.mark.parametrize("training", [{"rank": 0}, {"four_bit": True}])
def test_gradients_of_all_ways_are_the_plain_ones(training):
    case = replace(TOY, **training)
    errors = gradient_errors(case, [way for way in WAYS if not way.peer], CPU)
    assert set(errors) == {PLAIN, *(way.name for way in WAYS if not way.peer)}
    assert all(error < 2e-6 for error in errors.values())


def test_cards_that_cannot_be():
    with pytest.raises(InputError, match="24 GB on cpu"):
        Card(CPU, 24 * 10**9)
    if torch.cuda.is_available():
        with pytest.raises(InputError, match="9000 GB on a device"):
            Card(torch.device("cuda"), 9000 * 10**9)


@pytest.mark.gpu
def test_a_cap_is_felt_and_taken_off_again():
    card = Card(torch.device("cuda"), 10**9)
    with card:
        assert card.capacity_gib == 1e9 / 2**30
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1_100_000_000, dtype=torch.uint8, device="cuda")
        card.clean()
        held = torch.zeros(600_000_000, dtype=torch.uint8, device="cuda")
        assert 0.55 < card.peaks()["peak_gib"] <= card.peaks()["reserved_gib"] < 1e9 / 2**30
        del held
    card.clean()
    large = torch.empty(1_100_000_000, dtype=torch.uint8, device="cuda")
    with pytest.raises(InputError, match=r"a card of 1 GB, of which this process already holds 1\.\d GB"), card:
        pass
    del large  # what stays cached must not count on the next test's smaller card


@pytest.mark.gpu
def test_the_longest_on_a_small_card():
    """Two GB: what passed stays within them, and a little more does not fit. (A toy's tries are too short to predict
    the time of long ones.)"""
    case = Case("gpu", "qwen2.5-0.5b", 1, 64, 64, rank=4, four_bit=True)
    card = Card(torch.device("cuda"), 2_000_000_000)
    ways = [WAYS[0], WAYS[2]]
    for entry in find_longest(case, ways, card, budget_s=240, probes=(2048, 4096)):
        tried = [(row["tokens"], row.get("peak_gib"), row.get("reserved_gib")) for row in entry["rows"]]
        assert entry["limited_by"] == "memory", tried
        assert entry["longest"] < entry["fails_at"]
        best = next(row for row in entry["rows"] if row["tokens"] == entry["longest"])
        assert best["reserved_gib"] <= 2_000_000_000 / 2**30
        if entry["method"] == WAYS[2].name:
            assert best["pinned_gib"] == pytest.approx(23 * best["tokens"] * 896 * 2 / 2**30, rel=0.05)


def test_mixtures_are_not_quantised():
    class Mixture(torch.nn.Module):
        class config:  # noqa: N801
            @staticmethod
            def to_dict():
                return {"num_experts": 8}

    pytest.importorskip("bitsandbytes")
    with pytest.raises(InputError, match="mixture of 8 experts"):
        quantise(Mixture())


def test_data_is_the_same_for_rows_and_bins():
    data = Data.make(Case("x", "toy", 3, 40, 100), CPU)
    ids = torch.cat([batch.input_ids for batch in data.batches]).view(-1, 39)
    rows = torch.cat([batch.row_ids for batch in data.batches])
    assert torch.equal(ids[rows.argsort()], data.ids[:, :-1]) and data.prompt == 20
    for batch in data.batches:
        rows = batch.row_ids.tolist()
        assert torch.equal(batch.reference_logprobs[batch.scored_index], data.reference[rows].flatten())
        assert torch.equal(batch.advantages[batch.scored_index], data.advantages[rows].repeat_interleave(20))
    assert set(SHAPES) >= {"qwen2.5-0.5b", "qwen3-1.7b", "llama-3.2-3b", "llama-3.1-8b", "qwen3-14b", "toy"}


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_measures_given_lengths(monkeypatch):
    monkeypatch.setattr(bench, "WAYS", WAYS[:1])
    said = []
    entry = benchmark("toy", "lora", tokens=[64], device="cpu", say=said.append)
    assert entry["shape"] == "toy" and entry["training"] == "lora" and entry["card_gb"] is None
    assert [row["tokens"] for row in entry["methods"][0]["rows"]] == [64] and len(said) == 1
    assert 0 <= entry["gradient_errors"][RECOMPUTE.name] < 2e-6
    assert entry["environment"]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"model": "llama-9b", "tokens": [64]}, "model 'llama-9b' is no known shape (want qwen2.5-0.5b"),
        ({"gpu": "many"}, "gpu is 'many': it is no size of memory (want one like 24GB or 512MiB)"),
        ({"gpu": "24GB", "tokens": [64]}, "a card of 24 GB on cpu (want a CUDA device"),
        ({"model": "qwen3-1.7b"}, "nothing to search on cpu: memory has no cap there (want lengths, or a CUDA device)"),
        ({"tokens": [64, 1]}, "tokens is 1 (want at least 8: prompt and completion)"),
        ({"training": "dora"}, "method is 'dora' (want full, lora, qlora)"),
        ({"device": "cuda:x"}, "'cuda:x' (want auto, cpu, cuda or cuda:N)"),
    ],
)
def test_bad_input_is_one_line(arguments, line):
    with pytest.raises(InputError) as found:
        benchmark(**{"model": "toy", "device": "cpu", **arguments})
    assert line in str(found.value) and "\n" not in str(found.value)
