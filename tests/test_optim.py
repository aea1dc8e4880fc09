"""AdamW against its formula in float64, with the rates that each parameter was given; clip, schedules and skipped steps."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from transformers import TrainingArguments

from fastlatent.config import load_config
from fastlatent.optim import Optimizer

WORDS = ["hrpo_quickstart", "num_steps=10", "objective.num_epochs=1", "objective.num_minibatches=1", "optim.lr=1e-3",
         "optim.weight_decay=0.02", "optim.betas=[0.8,0.9]", "optim.eps=1e-6", "optim.max_grad_norm=0",
         "optim.schedule=constant",
         "optim.warmup_ratio=0", "method.lr_gate=3e-4", "method.lr_lambda=5e-3", "method.weight_decay=0.1"]


def optimizer(*more: str) -> Optimizer:
    config, policy = load_config(*WORDS, *more), tiny.policy("hrpo")
    policy.method.config = config.method
    return Optimizer(policy, config)


def rates(name: str) -> tuple[float, float]:
    """Learning rate and decay as the options above say; the decay is on Lambda, too (HRPO's own code)."""
    if name.startswith("method.gate_lambda"):
        return 5e-3, 0.1
    if name.startswith("method."):
        return 3e-4, 0.1
    return 1e-3, 0.0 if "norm" in name or "bias" in name else 0.02


def give_gradients(ours: Optimizer, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in ours.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return {name: p.grad.double() for name, p in ours.parameters.items()}


def test_every_parameter_moves_by_the_formula_with_its_own_rates():
    """Decoupled weight decay, arXiv:1711.05101 algorithm 2."""
    ours = optimizer()
    assert {rates(name) for name in ours.parameters} == {(5e-3, 0.1), (3e-4, 0.1), (1e-3, 0.02), (1e-3, 0.0)}
    wanted = {name: p.detach().double() for name, p in ours.parameters.items()}
    first = {name: torch.zeros_like(p) for name, p in wanted.items()}
    second = {name: torch.zeros_like(p) for name, p in wanted.items()}
    for step in (1, 2, 3):
        for name, grad in give_gradients(ours, step).items():
            lr, decay = rates(name)
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.9 * second[name] + 0.1 * grad**2
            direction = first[name] / (1 - 0.8**step) / ((second[name] / (1 - 0.9**step)).sqrt() + 1e-6)
            wanted[name] = wanted[name] - lr * decay * wanted[name] - lr * direction
        ours.step(torch.tensor(False))
        assert all(p.grad is None for p in ours.parameters.values())
    for name, parameter in ours.parameters.items():
        assert torch.allclose(parameter.double(), wanted[name], rtol=1e-6, atol=1e-6), name


def test_gradients_are_scaled_to_the_largest_norm_and_their_own_is_told():
    for bound, scale in (("0.5", 0.5), ("1e9", None), ("0", None)):
        ours = optimizer(f"optim.max_grad_norm={bound}")
        grads = give_gradients(ours, 0)
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        assert float(ours.clip()) == pytest.approx(norm, rel=1e-5) and norm > 1
        for name, parameter in ours.parameters.items():
            wanted = grads[name] * (scale / norm if scale else 1)
            assert torch.allclose(parameter.grad.double(), wanted, rtol=1e-4, atol=1e-9), name


def test_a_bad_step_moves_neither_weights_nor_moments_and_the_schedule_goes_on():
    ours = optimizer("optim.schedule=linear")
    give_gradients(ours, 0)
    ours.step(torch.tensor(False))
    before = {name: p.detach().clone() for name, p in ours.parameters.items()}
    tensors, _ = ours.state()
    moments = {name: tensor.clone() for name, tensor in tensors.items()}
    for parameter in ours.parameters.values():
        parameter.grad = torch.full_like(parameter, torch.nan)
    ours.step(torch.tensor(True))
    assert all(torch.equal(p, before[name]) for name, p in ours.parameters.items())
    assert all(torch.equal(tensor, moments[name]) for name, tensor in ours.state()[0].items())
    assert ours.lr == pytest.approx(1e-3 * 8 / 10)


def warm(step: int, rest) -> float:
    """Of ten steps two warm up."""
    return step / 2 if step < 2 else rest((step - 2) / 8)


SCHEDULES = {
    "constant": lambda step: 1.0,
    "linear": lambda step: warm(step, lambda part: 1 - part),
    "constant_with_warmup": lambda step: warm(step, lambda part: 1.0),
    "cosine": lambda step: warm(step, lambda part: (1 + math.cos(math.pi * part)) / 2),
    "inverse_sqrt": lambda step: step / 2 if step < 2 else math.sqrt(2 / step),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_by_name_scales_every_rate(name):
    ours = optimizer(f"optim.schedule={name}", f"optim.warmup_ratio={0 if name == 'constant' else 0.2}")
    initial = [rates(names[0])[0] for names in ours.group_names]
    assert len(set(initial)) == 3
    for step in range(10):
        wanted = [SCHEDULES[name](step) * lr for lr in initial]
        assert [group["lr"] for group in ours.adamw.param_groups] == pytest.approx(wanted)
        give_gradients(ours, step)
        ours.step(torch.tensor(False))


@pytest.mark.parametrize("ratio, num_steps", [(0.1, 934), (0.1, 4), (0.25, 8)])
def test_the_warm_up_is_as_long_as_that_of_transformers(tmp_path, ratio, num_steps):
    """The trainer of the published recipes is transformers'."""
    wanted = TrainingArguments(output_dir=str(tmp_path), warmup_steps=ratio, use_cpu=True).get_warmup_steps(num_steps)
    ours = optimizer("optim.schedule=constant_with_warmup", f"optim.warmup_ratio={ratio}", f"num_steps={num_steps}")
    told, highest = [], 1e-3
    while not told or told[-1] < highest:
        told.append(ours.lr)
        ours.pass_over(1)
    assert told == pytest.approx([highest * step / wanted for step in range(wanted + 1)])
