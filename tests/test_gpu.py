"""The trainer on the device: the law of replay, tokens and gradients as on a CPU, and a decode step that compiles.

Each test also runs on a CPU where that says something; the GPU's are skipped without one.
"""

from __future__ import annotations

import pytest
import tiny
import torch

from benches import setting, update
from fastlatent import build
from fastlatent.config import load_config
from fastlatent.packing import Item, pack
from fastlatent.types import Rollout

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RECIPES = ["hrpo_quickstart", "grpo_quickstart"]
FP32_TOLERANCE, BF16_MEAN_TOLERANCE = 2e-4, 0.03


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("model")))


def configured(recipe: str, model: str, device: str, dtype: str, *words: str):
    return load_config(recipe, overrides=[f"model.path={model}", f"model.device={device}", f"model.dtype={dtype}", *words])


def drawn(config) -> tuple[torch.nn.Module, list[Rollout]]:
    policy, tokenizer = build.policy(config), build.tokenizer(config)
    engine = build.engine(config, policy, tokenizer)
    engine.load_weights(policy.published(), 0)
    requests = tiny.requests(setting.prompts(config, tokenizer, 3), 4)
    return policy, engine.generate(requests, build.sampling_of(config))


@torch.no_grad()
def gaps(policy, rollouts: list[Rollout], temperature: float, *, is_shifted: bool = False) -> torch.Tensor:
    """|replayed - sampled| log-probability of every action, its prompts shared."""
    batch = pack([Item(r, 1.0, 1.0) for r in rollouts], policy.device, share_prompts=True)
    if is_shifted:
        batch.record_T = {name: column.roll(1, 0) for name, column in batch.record_T.items()}
    return (policy.score(batch, temperature).logprob_A - batch.behaviour_logprob_A).abs()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_replay_on_the_device(recipe, dtype, device, model):
    config = configured(recipe, model, device, dtype)
    (policy, rollouts), temperature = drawn(config), config.sampling.temperature
    found = gaps(policy, rollouts, temperature)
    assert found.max() <= FP32_TOLERANCE if dtype == "float32" else found.mean() <= BF16_MEAN_TOLERANCE
    if recipe.startswith("hrpo") and dtype == "float32":
        assert gaps(policy, rollouts, temperature, is_shifted=True).max() > 10 * FP32_TOLERANCE


@pytest.mark.parametrize("device", DEVICES)
def test_replay_of_completions_cut_while_they_think_on_the_device(device, model):
    """Their last latents are read by nobody, and lie where a sibling's first one does if they are laid out."""
    config = configured("hrpo_quickstart", model, device, "float32", "thinking.max_tokens=null", "thinking.force=null",
                        "thinking.stop=[]")
    policy, rollouts = drawn(config)
    assert sum(r.latent[-1] for r in rollouts) > 4
    assert gaps(policy, rollouts, config.sampling.temperature).max() <= FP32_TOLERANCE


def assert_same_but_for_a_tie(got: list[Rollout], want: list[Rollout]) -> None:
    """Two scores that rounding reorders may change one completion, from there on."""
    assert sum(g.token_ids != w.token_ids for g, w in zip(got, want, strict=True)) <= 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_tokens_are_those_of_a_cpu(recipe, device, model):
    other = ("engine.kv=static",) if device == "cpu" else ()
    _, want = drawn(configured(recipe, model, "cpu", "float32"))
    _, got = drawn(configured(recipe, model, device, "float32", *other))
    assert_same_but_for_a_tie(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_compiled_decode_step_draws_the_same_tokens(recipe, model):
    _, want = drawn(configured(recipe, model, "cuda", "float32"))
    _, got = drawn(configured(recipe, model, "cuda", "float32", "engine.kv=static", "engine.compile=true"))
    assert_same_but_for_a_tie(got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_an_update_is_that_of_a_cpu(device, model):
    """Norm of the gradient of completions drawn where they are learnt from; on a CPU in microbatches instead of in one."""
    other = ("update.tokens_per_microbatch=200", "update.share_prompts=false") if device == "cpu" else ()
    norms = []
    for config in (configured("hrpo_quickstart", model, "cpu", "float32"),
                   configured("hrpo_quickstart", model, device, "float32", *other)):
        groups = update.draw(config, build.tokenizer(config), 16)
        norms.append((float(update.our_update(config, groups, build.policy(config))()),
                      [r.token_ids for group in groups for r in group.rollouts]))
    (want, tokens), (got, same) = norms
    assert tokens == same and got == pytest.approx(want, rel=1e-3)
