import math

import pytest
import torch

from grpo.config import OptimizerConfig
from grpo.optim import Schedule, load_optimizer_state, make_optimizer, optimizer_state


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_schedule_by_hand(kind, warmup):
    config = OptimizerConfig(learning_rate=2.0, lr_scheduler_type=kind, warmup_ratio=warmup, min_lr_ratio=0.1)
    for position in range(25):
        rate = Schedule(config, 20, position).learning_rate()
        rising = 5 if warmup else 0
        if position < rising:
            wanted = 2.0 * (position + 1) / 5
        else:
            done = min(1.0, (position - rising) / (20 - rising))
            wanted = {
                "constant": 2.0,
                "linear": 2.0 * (1 - 0.9 * done),
                "cosine": 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2),
            }[kind]
        assert rate == pytest.approx(wanted, rel=1e-12)


def test_adamw_by_hand_with_decay_on_matrices_only():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, adam_beta1=0.8, adam_beta2=0.9)
    matrix = torch.nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    vector = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = make_optimizer({"matrix": matrix, "vector": vector}, config)
    values, m, v = [1.0, -2.0, 3.0], [0.0] * 3, [0.0] * 3
    for step in range(1, 5):
        grads = [0.3 * step, -0.1, 0.7 / step]
        matrix.grad, vector.grad = (
            torch.tensor([grads[:2]], dtype=torch.float64),
            torch.tensor(grads[2:], dtype=torch.float64),
        )
        Schedule(config, 10, step).apply(optimizer)
        optimizer.step()
        for i, g in enumerate(grads):
            m[i], v[i] = 0.8 * m[i] + 0.2 * g, 0.9 * v[i] + 0.1 * g * g
            if i < 2:
                values[i] *= 1 - 0.1 * 0.5
            values[i] -= 0.1 * (m[i] / (1 - 0.8**step)) / (math.sqrt(v[i] / (1 - 0.9**step)) + 1e-8)
    assert [*matrix[0].tolist(), *vector.tolist()] == pytest.approx(values, rel=1e-12)


def test_state_keeps_its_own_dtype_and_the_next_step_is_bitwise_the_same():
    def fresh():
        torch.manual_seed(0)
        parameters = {"a.b": torch.nn.Parameter(torch.randn(3, 2, dtype=torch.bfloat16))}
        return parameters, make_optimizer(parameters, OptimizerConfig(learning_rate=0.1))

    def step(parameters, optimizer):
        parameters["a.b"].grad = torch.full((3, 2), 0.3, dtype=torch.bfloat16)
        optimizer.step()

    parameters, optimizer = fresh()
    step(parameters, optimizer)
    optimizer.state[parameters["a.b"]]["exp_avg"] = torch.full((3, 2), 0.123456789)  # fp32 beside a bf16 weight
    saved = {name: value.clone() for name, value in optimizer_state(optimizer, parameters).items()}
    assert saved["a.b/exp_avg"].dtype == torch.float32
    again, other = fresh()
    again["a.b"].data.copy_(parameters["a.b"].data)
    load_optimizer_state(other, again, saved)
    restored = optimizer_state(other, again)
    assert all(
        torch.equal(restored[name], value) and restored[name].dtype == value.dtype for name, value in saved.items()
    )
