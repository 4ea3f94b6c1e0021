import random

import pytest

from grpo import SFTConfig, SFTTrainer
from grpo.batch import Completion, Prompt, Rollouts, ScoredRollouts
from grpo.packing import Document, balanced_bins, best_fit, pack, pack_documents, packing_metrics
from tests.tiny import tiny_model, tokenizer
from tests.trainer.test_update import make_trainer


def slow_places(document):
    """(input id, position, target, sampler log-prob or None outside the completion) of each place, one by one."""
    tokens = [*document.prompt_ids, *document.completion_ids]
    places = []
    for place in range(len(tokens) - 1):
        of_completion = place + 1 - len(document.prompt_ids)
        logprob = document.sampler_logprobs[of_completion] if of_completion >= 0 else None
        places.append((tokens[place], place, tokens[place + 1], logprob))
    return places


def some_documents(seed, count=40):
    draw = random.Random(seed)
    documents = []
    for row in range(count):
        completion = [draw.randrange(9) for _ in range(draw.randint(1, 30))]
        documents.append(
            Document(
                row,
                [draw.randrange(9) for _ in range(draw.randint(1, 12))],
                completion,
                [-draw.random() for _ in completion],
                draw.uniform(-1, 1),
            )
        )
    return documents


@pytest.mark.parametrize("capacity", [1, 17, 64, 10_000])
def test_every_place_of_every_document(capacity):
    documents = some_documents(capacity)
    seen = set()
    for batch in pack_documents(documents, capacity):
        bounds = batch.cu_seqlens.tolist()
        completion_bounds = batch.completion_cu_seqlens.tolist()
        assert bounds[-1] <= capacity or len(bounds) == 2
        for index, row in enumerate(batch.row_ids.tolist()):
            seen.add(row)
            start = bounds[index]
            scored = []
            for offset, (token, position, target, logprob) in enumerate(slow_places(documents[row])):
                t = start + offset
                assert (int(batch.input_ids[t]), int(batch.positions[t]), int(batch.targets[t])) == (
                    token,
                    position,
                    target,
                )
                assert bool(batch.loss_mask[t]) == (logprob is not None)
                if logprob is not None:
                    scored.append(t)
                    assert float(batch.sampler_logprobs[t]) == pytest.approx(logprob, abs=1e-7)
                    assert float(batch.advantages[t]) == pytest.approx(documents[row].advantage, abs=1e-7)
                else:
                    assert float(batch.advantages[t]) == 0
            assert bounds[index + 1] == start + offset + 1
            assert batch.scored_index[completion_bounds[index] : completion_bounds[index + 1]].tolist() == scored
    assert seen == set(range(len(documents)))


def test_pad_and_eos_values_mean_nothing():
    """Ids that other code uses as pad (0) or EOS (1), alone and in runs, move no mask."""
    plain = [Document(0, [5, 6], [7, 8, 1], [-1.0] * 3), Document(1, [5], [2, 3], [-1.0] * 2)]
    odd = [Document(0, [0, 0], [0, 1, 0], [-1.0] * 3), Document(1, [1], [1, 1], [-1.0] * 2)]
    (a,), (b,) = pack_documents(plain, 100), pack_documents(odd, 100)
    for name in ("loss_mask", "positions", "cu_seqlens", "scored_index", "completion_cu_seqlens"):
        assert getattr(a, name).tolist() == getattr(b, name).tolist()


def test_best_fit_is_the_textbook_one():
    # 6 opens A, 5 opens B (room 5), 4 fits A exactly (the fuller), 3 goes to B, 2 fills B, 1 opens nothing: C
    assert best_fit([5, 6, 4, 3, 2, 1], 10) == [[1, 2], [0, 3, 4], [5]]
    assert best_fit([3, 3, 3], 3) == [[0], [1], [2]]
    assert best_fit([30, 2], 10) == [[0], [1]]  # too long: alone


def slow_best_fit(lengths, capacity):
    """By its definition: among the bins with room, the one with the least of it."""
    bins, room = [], []
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [index for index, left in enumerate(room) if left >= lengths[item]]
        if fitting:
            target = min(fitting, key=lambda index: room[index])
        else:
            target = len(bins)
            bins.append([])
            room.append(capacity)
        bins[target].append(item)
        room[target] -= lengths[item]
    return bins


def some_lengths(draw):
    longest = draw.choice([3, 40, 1000])
    return [draw.randint(1, longest) for _ in range(draw.randint(0, 60))]


def test_best_fit_against_its_definition():
    draw = random.Random(1)
    for _ in range(500):
        lengths, capacity = some_lengths(draw), draw.randint(1, 1200)
        assert best_fit(lengths, capacity) == slow_best_fit(lengths, capacity)


def loads(bins, lengths):
    return [sum(lengths[item] for item in indices) for indices in bins]


def test_balanced_bins_are_no_more_and_no_larger_than_best_fit():
    draw = random.Random(2)
    for _ in range(500):
        lengths, capacity = some_lengths(draw), draw.randint(1, 1200)
        given, found = slow_best_fit(lengths, capacity), balanced_bins(lengths, capacity)
        assert sorted(item for indices in found for item in indices) == list(range(len(lengths)))
        assert len(found) <= len(given)
        assert all(found)
        assert max(loads(found, lengths), default=0) <= max(loads(given, lengths), default=0)
        for indices, load in zip(found, loads(found, lengths), strict=True):
            assert load <= capacity or len(indices) == 1
        assert found == balanced_bins(list(lengths), capacity)


def test_balance_by_hand():
    assert loads(best_fit([4, 3, 3, 1], 10), [4, 3, 3, 1]) == [10, 1]
    assert sorted(loads(balanced_bins([4, 3, 3, 1], 10), [4, 3, 3, 1])) == [5, 6]  # the best there is
    # halving finds 6 | 6 where longest first gives 7 | 5, and longest first 12 | 12 where halving stays at 13 | 11
    assert loads(balanced_bins([3, 3, 2, 2, 2], 8), [3, 3, 2, 2, 2]) == [6, 6]
    assert loads(balanced_bins([6, 5, 4, 4, 3, 2], 13), [6, 5, 4, 4, 3, 2]) == [12, 12]
    # an item that is too long stands alone and does not loosen the limit of the others
    assert loads(balanced_bins([30, 4, 3, 3, 1], 10), [30, 4, 3, 3, 1]) in ([30, 5, 6], [30, 6, 5])
    assert sorted(loads(balanced_bins([30, 6, 5, 5, 4], 10), [30, 6, 5, 5, 4])) == [10, 10, 30]
    assert balanced_bins([], 10) == []


@pytest.mark.parametrize(("count", "capacity"), [(30, 4096), (128, 16384), (2000, 4096)])
def test_utilization_of_a_long_mix(count, capacity):
    draw = random.Random(count)
    lengths = [draw.randint(32, 256) if draw.random() < 0.6 else draw.randint(257, 1024) for _ in range(count)]
    found = loads(balanced_bins(lengths, capacity), lengths)
    assert sum(lengths) / (len(found) * max(found)) > 0.99


def rollouts_of(lengths):
    prompts = [Prompt(p, [1, 2, 3], {"prompt": "x"}) for p in range(len(lengths))]
    completions = [[Completion([4] * n, [-0.5] * n, "stop", "") for n in group] for group in lengths]
    return ScoredRollouts(Rollouts(prompts, completions, 0), [[1.0] * len(g) for g in lengths], {})


def test_totals_count_what_the_loss_divides_by():
    scored = rollouts_of([[3, 5], [2, 2], [4, 0]])
    advantages = [[0.5, -0.5], [0.0, 0.0], [None, 1.0]]
    bins, totals = pack(scored, advantages, 100, skip_zero_advantage=True)
    assert (totals.tokens, totals.sequences, totals.groups) == (12, 4, 2)  # zeros count, None and empty do not
    assert sorted(row for b in bins for row in b.row_ids.tolist()) == [0, 1]
    bins, again = pack(scored, advantages, 100, skip_zero_advantage=False)
    assert again == totals
    assert sorted(row for b in bins for row in b.row_ids.tolist()) == [0, 1, 2, 3]


def test_packing_is_deterministic_and_order_follows_rows():
    scored = rollouts_of([[5, 9, 2, 7], [3, 3, 8, 1]])
    advantages = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]
    flat = [a for group in advantages for a in group]
    for batch in pack(scored, advantages, 16, skip_zero_advantage=True)[0]:
        for row, start, end in zip(
            batch.row_ids.tolist(),
            batch.completion_cu_seqlens[:-1].tolist(),
            batch.completion_cu_seqlens[1:].tolist(),
            strict=True,
        ):
            values = batch.advantages[batch.scored_index[start:end]]
            assert values.tolist() == pytest.approx([flat[row]] * (end - start))


def test_empty_document_is_refused():
    with pytest.raises(ValueError, match="document 7 has an empty prompt or completion"):
        pack_documents([Document(7, [], [1])], 10)


# --- shared prompts --------------------------------------------------------------------------------------------------


def some_groups(draw, num_generations, num_prompt):
    """Rollouts with unequal, equal and empty completions; ids collide on purpose: 0 is a usual pad, 1 a usual EOS."""
    prompts, completions, advantages = [], [], []
    for p in range(draw.randint(1, 5)):
        prompt = [draw.randrange(4) for _ in range(num_prompt)]
        prompts.append(Prompt(p, prompt if p % 2 or not prompts else prompts[-1].token_ids, {}))
        group = []
        for _ in range(num_generations):
            ids = [draw.randrange(4) for _ in range(draw.choice([0, 1, 1, 5, draw.randint(2, 40)]))]
            group.append(Completion(ids, [-draw.random() for _ in ids], "stop", ""))
        if len(group) > 1 and draw.random() < 0.3:
            group[1] = group[0]
        completions.append(group)
        advantages.append([draw.choice([None, 0.0, draw.uniform(-1, 1)]) for _ in group])
    rewards = [[1.0] * num_generations for _ in prompts]
    return ScoredRollouts(Rollouts(prompts, completions, 0), rewards, {}), advantages


def visible_rows(layout, row):
    """The rows that `row` attends to, in order, by the definition of Segments and with tensors where it has them."""
    bounds = layout.cu_seqlens.tolist()
    (s,) = [s for s in range(len(bounds) - 1) if bounds[s] <= row < bounds[s + 1]]
    if layout.key_index is None:
        keys = list(range(bounds[s], bounds[s + 1]))
    else:
        starts = layout.key_cu_seqlens.tolist()
        keys = layout.key_index.tolist()[starts[s] : starts[s + 1]]
    after = bounds[s + 1] - 1 - row
    return keys[: len(keys) - after]  # bottom-right causal: the segment's last row sees every key


def check_completion(batch, index, prompt, completion, advantage):
    """One completion of a bin: each of its tokens is predicted once, after exactly the tokens before it."""
    tokens = [*prompt.token_ids, *completion.token_ids]
    first, end = batch.completion_cu_seqlens[index : index + 2].tolist()
    rows = batch.scored_index[first:end].tolist()
    assert len(rows) == len(completion.token_ids)
    for place, row in enumerate(rows):
        position = len(prompt.token_ids) - 1 + place
        seen = visible_rows(batch.segments, row)
        assert [int(batch.input_ids[t]) for t in seen] == tokens[: position + 1]
        assert [int(batch.positions[t]) for t in seen] == list(range(position + 1))
        assert seen[-1] == row
        for t in seen:  # and what those rows saw themselves: nothing else reaches them
            assert set(visible_rows(batch.segments, t)) <= set(seen)
        assert int(batch.targets[row]) == tokens[position + 1]
        assert bool(batch.loss_mask[row])
        assert float(batch.sampler_logprobs[row]) == pytest.approx(completion.sampler_logprobs[place], abs=1e-7)
        assert float(batch.advantages[row]) == pytest.approx(advantage, abs=1e-7)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("num_generations", [1, 2, 8])
@pytest.mark.parametrize("num_prompt", [1, 2, 7, 50])
def test_every_completion_of_shared_prompts(num_prompt, num_generations, skip):
    draw = random.Random(1000 * num_prompt + 10 * num_generations + skip)
    for capacity in (1, 20, 60, 150, 10_000):
        scored, advantages = some_groups(draw, num_generations, num_prompt)
        bins, totals = pack(scored, advantages, capacity, skip_zero_advantage=skip, share_prompts=True)
        plain, same_totals = pack(scored, advantages, capacity, skip_zero_advantage=skip)
        assert totals == same_totals
        wanted = {
            p * num_generations + g
            for p, group in enumerate(scored.rollouts.completions)
            for g, completion in enumerate(group)
            if completion.token_ids and advantages[p][g] is not None and not (skip and advantages[p][g] == 0)
        }
        assert sorted(row for batch in bins for row in batch.row_ids.tolist()) == sorted(wanted)
        assert sum(b.input_ids.numel() for b in bins) <= sum(b.input_ids.numel() for b in plain)
        for batch in bins:
            check_bin(batch, scored, advantages, capacity)


def check_bin(batch, scored, advantages, capacity):
    size, rows = batch.input_ids.numel(), batch.row_ids.tolist()
    assert size <= capacity or len(rows) == 1
    assert batch.completion_cu_seqlens[0] == 0
    assert batch.scored_index.tolist() == sorted(set(batch.scored_index.tolist()))
    assert batch.completion_cu_seqlens[-1] == batch.scored_index.numel() == int(batch.loss_mask.sum())
    assert sum(batch.segments.lengths) == size
    assert (batch.advantages[~batch.loss_mask] == 0).all()
    for first, count in batch.segments.prefixes:  # earlier, and a whole segment
        assert count == 0 or (first, first + count) in zip(
            batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False
        )
    groups = {}
    for index, row in enumerate(rows):
        p, g = divmod(row, len(advantages[0]))
        completion = scored.rollouts.completions[p][g]
        check_completion(batch, index, scored.rollouts.prompts[p], completion, advantages[p][g])
        groups.setdefault(p, []).append(len(completion.token_ids))
    # a prompt once for each piece of a group; two pieces of a group in a bin would have been one
    prompts = {p: len(scored.rollouts.prompts[p].token_ids) - 1 for p in groups}
    assert size == sum(prompts[p] + sum(counts) for p, counts in groups.items())


def test_sharing_by_hand():
    """Prompt of 3, completions of 2 and 1: rows 0–1 are the prefix, then [p2 a0] and [p2]."""
    prompts = [Prompt(0, [5, 6, 7], {})]
    completions = [[Completion([8, 9], [-1.0, -2.0], "stop", ""), Completion([4], [-3.0], "stop", "")]]
    scored = ScoredRollouts(Rollouts(prompts, completions, 0), [[1.0, 0.0]], {})
    (batch,), _ = pack(scored, [[0.5, -0.5]], 100, skip_zero_advantage=True, share_prompts=True)
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 7]
    assert batch.targets.tolist() == [6, 7, 8, 9, 4]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2]
    assert batch.segments.lengths == (2, 2, 1)
    assert batch.segments.prefixes == ((0, 0), (0, 2), (0, 2))
    assert batch.segments.key_index.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4]
    assert batch.segments.key_cu_seqlens.tolist() == [0, 2, 6, 9]
    assert batch.scored_index.tolist() == [2, 3, 4]
    assert batch.completion_cu_seqlens.tolist() == [0, 2, 3]
    assert batch.advantages.tolist() == [0, 0, 0.5, 0.5, -0.5]
    assert batch.sampler_logprobs.tolist() == [0, 0, -1, -2, -3]


def test_a_completion_alone_with_its_prompt_is_an_ordinary_document():
    scored = rollouts_of([[4], [6]])
    (batch,), _ = pack(scored, [[1.0], [1.0]], 100, skip_zero_advantage=True, share_prompts=True)
    assert batch.segments.lengths == (8, 6)
    assert batch.segments.prefixes == ((0, 0), (0, 0))
    assert batch.segments.key_index is None


def test_tokens_of_shared_prompts():
    """P = 800, R = 100, G = 8: 8·899 rows become 799 + 800; divided over two bins the prompt is run twice."""
    prompts = [Prompt(0, [3] * 800, {})]
    completions = [[Completion([4] * 100, [-0.5] * 100, "length", "") for _ in range(8)]]
    scored = ScoredRollouts(Rollouts(prompts, completions, 0), [[1.0] * 8], {})

    def rows(capacity, share):
        bins, _ = pack(scored, [[1.0] * 8], capacity, skip_zero_advantage=True, share_prompts=share)
        return [b.input_ids.numel() for b in bins]

    assert rows(10_000, share=False) == [8 * 899]
    assert rows(10_000, share=True) == [799 + 800]
    assert sorted(rows(1300, share=True)) == [799 + 300, 799 + 500]
    assert rows(100, share=True) == [899] * 8


def test_packing_metrics_of_a_step():
    scored = rollouts_of([[3, 5], [4, 1]])  # prompts of 3
    bins, _ = pack(scored, [[1.0, -1.0]] * 2, 11, skip_zero_advantage=True, share_prompts=True)
    assert packing_metrics(bins) == {
        "packing/num_bins": 2,
        "packing/tokens": (2 + 8) + (2 + 5),
        "packing/tokens_unshared": 5 + 7 + 6 + 3,
        "packing/utilization": 17 / 20,
    }
    plain, _ = pack(scored, [[1.0, -1.0]] * 2, 100, skip_zero_advantage=True)
    assert packing_metrics(plain) == {
        "packing/num_bins": 1,
        "packing/tokens": 21,
        "packing/tokens_unshared": 21,
        "packing/utilization": 1,
    }
    assert packing_metrics([]) == {"packing/num_bins": 0, "packing/tokens": 0, "packing/tokens_unshared": 0}


@pytest.mark.parametrize("share", [False, True])
def test_bins_do_not_depend_on_token_values(share):
    """pad == EOS (0) everywhere, or a pad id inside a completion, against ids that nobody gives a meaning."""

    def packed(fill):
        prompts = [Prompt(p, [fill(i) for i in range(n)], {}) for p, n in enumerate((1, 4, 9))]
        completions = [
            [Completion([fill(i) for i in range(n)], [-1.0] * n, "stop", "") for n in group]
            for group in ((3, 7, 7), (1, 12, 2), (5, 5, 6))
        ]
        scored = ScoredRollouts(Rollouts(prompts, completions, 0), [[1.0] * 3] * 3, {})
        return pack(scored, [[0.5, -0.5, 0.25]] * 3, 30, skip_zero_advantage=True, share_prompts=share)

    plain, totals = packed(lambda place: 100 + place)
    for odd in (lambda place: 0, lambda place: 0 if place in (1, 2) else 5):
        bins, same_totals = packed(odd)
        assert totals == same_totals
        assert len(bins) == len(plain) > 1
        for a, b in zip(plain, bins, strict=True):
            assert (a.segments.lengths, a.segments.prefixes) == (b.segments.lengths, b.segments.prefixes)
            for name in ("loss_mask", "positions", "scored_index", "completion_cu_seqlens", "row_ids", "advantages"):
                assert getattr(a, name).tolist() == getattr(b, name).tolist()


def test_metrics_rows_and_the_knob(tmp_path):
    """A GRPO step with and without shared prompts: fewer rows, the same loss and gradient norm."""

    def first_row(share):
        trainer = make_trainer(
            tmp_path / str(share),
            rewards=lambda completion: float(len(completion) % 3),
            max_steps=1,
            max_tokens_per_batch=60,
            share_prompts=share,
        )
        (row,) = list(trainer.steps())
        return row

    plain, shared = first_row(False), first_row(True)
    assert plain["packing/tokens"] == plain["packing/tokens_unshared"] == shared["packing/tokens_unshared"]
    assert shared["packing/tokens"] < plain["packing/tokens"]
    for row in (plain, shared):
        assert 0 < row["packing/tokens"] / row["packing/num_bins"] / row["packing/utilization"] <= 60
    assert shared["loss"] == pytest.approx(plain["loss"], abs=1e-6)
    assert shared["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


def test_metrics_rows_of_supervised_training(tmp_path):
    text = tokenizer()
    rows = [{"prompt": "sort 31", "completion": "13"}, {"prompt": "sort 402", "completion": "024"}]
    config = SFTConfig(output_dir=str(tmp_path), max_steps=1, examples_per_step=2, max_tokens_per_batch=11)
    trainer = SFTTrainer(tiny_model(vocab_size=len(text)), config, rows, processing_class=text)
    (row,) = list(trainer.steps())
    assert row["packing/num_bins"] == 2  # 7 + 3 − 1 and 8 + 4 − 1 rows
    assert row["packing/tokens"] == row["packing/tokens_unshared"] == row["step_tokens"] == 9 + 11
    assert row["packing/utilization"] == pytest.approx(20 / 22)
