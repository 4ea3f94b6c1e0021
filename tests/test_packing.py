import random

import pytest

from grpo.batch import Completion, Prompt, Rollouts, ScoredRollouts
from grpo.packing import Document, best_fit, pack, pack_documents


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


def test_utilisation_of_a_long_mix():
    draw = random.Random(3)
    lengths = [draw.randint(32, 256) if draw.random() < 0.6 else draw.randint(257, 1024) for _ in range(2000)]
    bins = best_fit(lengths, 4096)
    assert sum(lengths) / (len(bins) * 4096) > 0.97


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
