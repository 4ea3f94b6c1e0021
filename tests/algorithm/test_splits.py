"""The step does not depend on its bins: 1×8 ≡ 8×1 ≡ unequal ≡ shuffled, in loss, gradient and metrics."""

import math
from dataclasses import replace

import pytest
import torch

from grpo.algorithm import RECIPES, combine_metrics, entropy_quantile
from grpo.batch import Totals
from tests.algorithm.cases import make_case, run, worst
from tests.tolerances import SPLIT

LENGTHS = [3, 1, 12, 5, 40, 2, 7, 9]
WHOLE = [list(range(8))]
SPLITS = {
    "8×1": [[i] for i in range(8)],
    "unequal": [[0, 1, 2], [3], [4, 5, 6, 7]],
    "shuffled": [[5, 0], [7, 3, 2], [6, 4, 1]],
    "2×4 reversed": [[7, 6, 5, 4], [3, 2, 1, 0]],
}
KNOBS = {"beta": 0.2, "kl": "k3_ratio", "kl_in": "loss", "entropy_coef": 0.1, "top_entropy_quantile": 0.4}


def step(recipe, case, bins, totals=None, **knobs):
    """Loss, gradient in the order of the whole step, and metrics, summed over bins."""
    threshold = entropy_quantile(case.entropy[case.mask], knobs.get("top_entropy_quantile", 1.0))
    loss, gradients, metrics = 0.0, [None] * len(case.lengths), []
    for places in bins:
        part = case.select(places)
        own = totals or case.totals
        value, gradient, _, measured = run(
            recipe, part, totals=own, reference_logprobs=part.reference, entropy_threshold=threshold, **knobs
        )
        loss += float(value)
        metrics.append(measured)
        for place, piece in zip(places, gradient.split(part.lengths), strict=True):
            gradients[place] = piece
    return loss, torch.cat(gradients), combine_metrics(metrics)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_any_split_is_the_same_step(recipe, split, dtype):
    tolerance = SPLIT[str(dtype).removeprefix("torch.")]
    drift = 0.01 if RECIPES[recipe].importance_sampling_level != "token" else 0.3
    case = make_case(11, LENGTHS, drift=drift).to(dtype)
    whole, pieces = (step(recipe, case, bins, **KNOBS) for bins in (WHOLE, SPLITS[split]))
    assert abs(whole[0] - pieces[0]) <= tolerance * max(1, abs(whole[0]))
    assert worst(pieces[1], whole[1]) <= tolerance
    assert whole[2].keys() == pieces[2].keys()
    for name, value in whole[2].items():
        assert abs(pieces[2][name] - value) <= tolerance * max(1, abs(value)), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_totals_default_to_those_of_the_call(recipe):
    case = make_case(11, LENGTHS)
    extra = {"reference_logprobs": case.reference, "beta": 0.2, "kl": "k3_ratio", "kl_in": "loss"}
    assert torch.equal(run(recipe, case, **extra)[1], run(recipe, case, totals=case.totals, **extra)[1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_mean_of_means_is_another_step(recipe):
    """Sabotage on purpose: divisors of each bin. The tests above must be able to tell."""
    case = make_case(11, LENGTHS)
    right = step(recipe, case, WHOLE, sampler_correction="none")
    bins = SPLITS["unequal"]
    wrong = torch.cat([run(recipe, case.select(b), sampler_correction="none")[1] / len(bins) for b in bins])
    assert worst(wrong, right[1]) > 1e-4


@pytest.mark.parametrize("recipe", RECIPES)
def test_skipping_zero_advantage_rows_is_keeping_them(recipe):
    """β = c = 0: rows with A = 0 that are not forwarded but counted leave gradient and clip shares as they are."""
    case = make_case(11, LENGTHS, drift=0.01 if RECIPES[recipe].importance_sampling_level != "token" else 0.3)
    rows = [part if i not in (2, 5) else 0 * part for i, part in enumerate(case.advantages.split(case.lengths))]
    case = replace(case, advantages=torch.cat(rows))
    idle = [i for i, part in enumerate(case.advantages.split(case.lengths)) if float(part[0]) == 0]
    busy = [i for i in range(8) if i not in idle]
    assert idle and busy
    kept, skipped = step(recipe, case, WHOLE), step_of(recipe, case, busy)
    rows = kept[1].split(case.lengths)
    assert all((rows[i] == 0).all() for i in idle)
    assert worst(skipped[1], torch.cat([rows[i] for i in busy])) <= 1e-12
    assert abs(kept[0] - skipped[0]) <= 1e-12
    for name in ("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean", "cispo_clip_ratio"):
        assert abs(kept[2].get(name, 0) - skipped[2].get(name, 0)) <= 1e-12
    forwarded = torch.cat([part for i, part in enumerate(case.entropy.split(case.lengths)) if i in busy])
    inside = torch.cat([part for i, part in enumerate(case.mask.split(case.lengths)) if i in busy])
    assert abs(skipped[2]["entropy"] - float(forwarded[inside].mean())) <= 1e-12  # of the forwarded tokens


def step_of(recipe, case, places):
    """One bin of some rows under the counts of the whole step."""
    part = case.select(places)
    value, gradient, _, metrics = run(recipe, part, totals=case.totals, reference_logprobs=part.reference)
    return float(value), gradient, combine_metrics([metrics])


def test_with_kl_nothing_may_be_skipped():
    case = make_case(11, LENGTHS)
    zero = replace(case, advantages=torch.zeros_like(case.advantages))
    assert float(run("dapo", zero, reference_logprobs=zero.reference, beta=0.1)[1].abs().max()) > 0
    assert (run("dapo", zero)[1] == 0).all()


def test_minima_and_maxima_combine_as_such():
    """Shares per completion: low_min and high_max do not depend on the bins, nor on a bin without data."""
    case = make_case(11, LENGTHS, drift=0.6)
    parts = [run("dapo", case.select(places), totals=case.totals)[3] for places in SPLITS["8×1"]]
    empty = run("dapo", replace(case.select([0]), mask=torch.zeros(3, dtype=torch.bool)), totals=case.totals)[3]
    metrics, with_empty = combine_metrics(parts), combine_metrics([*parts, empty])
    low, high = [], []
    for row in case.rows():
        if row.inside:
            ratios = {t: row.logprobs[t] - row.old[t] for t in row.inside}
            low.append(sum(math.exp(r) < 0.8 and row.advantages[t] < 0 for t, r in ratios.items()) / len(ratios))
            high.append(sum(math.exp(r) > 1.28 and row.advantages[t] > 0 for t, r in ratios.items()) / len(ratios))
    assert metrics["clip_ratio/low_min"] == pytest.approx(min(low), abs=1e-12)
    assert metrics["clip_ratio/high_max"] == pytest.approx(max(high), abs=1e-12) and max(high) > 0
    assert metrics == with_empty


def test_totals_with_zero_counts_divide_by_one():
    case = make_case(1, [2, 3], masked=False)
    assert torch.isfinite(run("dapo", case, totals=Totals(0, 0, 0))[0])


def test_no_bins_no_metrics():
    assert combine_metrics([]) == {}
