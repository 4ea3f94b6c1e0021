"""On a GPU: the same numbers, no wait for the device inside a bin, and the same bits twice."""

from dataclasses import replace

import pytest
import torch

from grpo.algorithm import RECIPES, combine_metrics, policy_loss
from tests import reference
from tests.algorithm.cases import flat, make_case, worst
from tests.tolerances import LOSS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KNOBS = {"beta": 0.1, "kl": "k3_ratio", "kl_in": "loss", "off_policy_mask_threshold": 0.2}


def on_gpu(recipe, case, *, sync_debug="default"):
    """Loss, ∂loss/∂ℓ and metrics; with sync_debug="error" any wait for the device raises."""
    tensors = {name: value.cuda() for name, value in vars(case).items() if isinstance(value, torch.Tensor)}
    moved = replace(case, **tensors)
    bounds = case.cu_seqlens.cuda()
    logprobs = moved.logprobs.clone().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(sync_debug)
    try:
        loss, metrics = policy_loss(
            recipe, logprobs, moved.advantages, bounds, old_logprobs=moved.old, reference_logprobs=moved.reference,
            sampler_logprobs=moved.sampler, entropy=moved.entropy, loss_mask=moved.mask, totals=case.totals,
            max_completion_length=17, top_entropy_quantile=0.5, entropy_threshold=0.4, **KNOBS,
        )  # fmt: skip
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return loss.detach(), logprobs.grad, metrics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_equals_loop_and_never_waits(recipe, dtype):
    name = str(dtype).removeprefix("torch.")
    choices = replace(
        reference.RECIPES[recipe], delta=3.0, max_completion_length=17, beta=0.1, kl="k3_ratio", correction="truncate",
        off_policy=0.2, entropy_threshold=0.4,
    )  # fmt: skip
    on_gpu(recipe, make_case(0).to(dtype))  # the first call may wait while kernels load
    for seed in range(4):
        drift = 0.05 if choices.level != "token" else 0.3
        case = make_case(seed, [3, 40, 1, 300, 7], drift=drift).to(dtype)
        expected = reference.objective(case.to(torch.float64).rows(), choices)
        loss, gradient, metrics = on_gpu(recipe, case, sync_debug="error")
        assert abs(float(loss) - expected.loss) <= LOSS[name] * max(1, abs(expected.loss))
        assert worst(gradient.cpu(), flat(expected.gradient)) <= LOSS[name]
        assert abs(combine_metrics([metrics])["kl"] - expected.kl) <= 1e-5


@pytest.mark.parametrize("recipe", [name for name, row in RECIPES.items() if row.importance_sampling_level == "token"])
def test_the_same_bits_twice(recipe):
    case = make_case(3, [3, 4000, 1, 20_000, 7]).to(torch.float32)
    first, second = on_gpu(recipe, case), on_gpu(recipe, case)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
