"""The recipes hold the published hyper-parameters, written down here a second time from the specification."""

import pytest

from fastlatent.config import load_config, to_dict
from fastlatent.errors import UserError
from fastlatent.layers import recipes

# arXiv:2505.18454 and its released scripts
PUBLISHED = {
    "seed": 42,
    "num_prompts": 8,
    "model.path": "Qwen/Qwen2.5-1.5B-Instruct",
    "model.dtype": "bfloat16",
    "model.gradient_checkpointing": True,
    "model.trust_remote_code": False,
    "model.lora.r": 32,
    "model.lora.alpha": 64,
    "model.lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "chat.max_prompt_tokens": 1024,
    "chat.template": True,
    "thinking.end": "####",
    "thinking.max_tokens": None,
    "answer.max_tokens": None,
    "sampling.temperature": 0.5,
    "sampling.top_k": 50,
    "sampling.top_p": 1.0,
    "sampling.max_new_tokens": 1024,
    "objective.advantage": "z_score",
    "objective.advantage_eps": 1e-4,
    "objective.normalizer": "sequence_mean",
    "objective.kl_coef": 0.005,
    "objective.kl_estimator": "k3",
    "objective.entropy_coef": 0.0,
    "objective.score_temperature": 1.0,
    "objective.num_epochs": 1,
    "objective.num_minibatches": 1,
    "objective.mask_truncated_completions": False,
    "objective.filter_zero_variance": False,
    "optim.lr": 5e-6,
    "optim.betas": [0.9, 0.99],
    "optim.weight_decay": 0.1,
    "optim.schedule": "cosine",
    "optim.warmup_ratio": 0.1,
    "optim.max_grad_norm": 0.1,
}
GATE = {
    "method.name": "hrpo",
    "method.r_min": 0.99,
    "method.r_max": 0.999,
    "method.mixture": "behaviour",
    "method.lr_gate": 1e-4,
    "method.lr_lambda": 1e-3,
    "method.weight_decay": 0.1,
}
# completions per update: 4 x 8 prompts and 8 x 8 prompts; one epoch of 7473 and 7500 problems
GSM8K = {"group_size": 4, "num_steps": 7473 // 8, "data.answer_after": "####",
         "rewards": [{"name": "exact_number", "weight": 1.0, "strict": False}]}
MATH = {"group_size": 8, "num_steps": 7500 // 8, "data.answer_after": None,
        "rewards": [{"name": "math_equal", "weight": 1.0, "require_delimiter": True}]}
# arXiv:2604.27998 and arXiv:2511.06411 and their releases
MIXTURES = {
    "num_prompts": 64, "group_size": 8, "model.dtype": "bfloat16", "model.lora": None, "model.freeze_embedding": True,
    "thinking.max_tokens": None, "sampling.temperature": 0.6, "sampling.top_k": 30, "sampling.top_p": 0.95,
    "objective.advantage": "z_score", "objective.advantage_eps": 1e-6, "objective.normalizer": "token_mean",
    "objective.clip_low": 0.2, "objective.clip_high": 0.2, "objective.dual_clip": 3.0, "objective.entropy_coef": 0.0,
    "objective.score_temperature": None, "objective.num_epochs": 1, "optim.lr": 1e-6, "optim.weight_decay": 0.01,
    "optim.schedule": "constant", "optim.max_grad_norm": 1.0, "method.top_p": 0.95, "method.noise_low": -1.5,
    "method.noise_high": 3.0, "method.noise_scale": 1.0,
    "rewards": [{"name": "math_equal", "weight": 1.0, "require_delimiter": False}],
}
LATENT_GRPO = {
    "model.path": "DJCheng/LLaMA3.2-1B-Instruct-Latent-SFT-Top10", "chat.max_prompt_tokens": 192, "sampling.max_new_tokens": 128,
    "thinking.end": "</", "objective.num_minibatches": 64 // 16, "objective.kl_coef": 0.0,
    "objective.filter_zero_variance": True, "objective.max_filter_rounds": 50 - 1, "method.name": "latent_grpo",
    "method.top_k": 10, "method.candidates": "union", "method.one_sided": True, "method.delta": 0.0,
    "method.mixture_temperature": 1.0, "method.end_rule": "likeliest", "method.truncated": "masked",
    "method.bound_negative": True, "method.select_first": True, "method.clamp_density": False, "method.logprob_floor": None,
}
SOFT_GRPO = {
    "model.path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "sampling.max_new_tokens": 8192, "thinking.end": "</think>",
    "objective.num_minibatches": 64 // 32, "objective.kl_coef": 0.001, "objective.kl_estimator": "k3",
    "objective.filter_zero_variance": False, "method.name": "soft_grpo", "method.top_k": 5,
    "method.candidates": "renormalised", "method.one_sided": False, "method.mixture_temperature": 0.1,
    "method.clamp_density": True, "method.logprob_floor": -3.0, "method.truncated": "kept", "method.bound_negative": False,
    "method.select_first": False,
}
QUICKSTARTS = ("hrpo_quickstart", "grpo_quickstart", "latent_sft_quickstart", "latent_grpo_quickstart")
SPECIFICATION = {
    "latent_grpo_gsm8k": MIXTURES | LATENT_GRPO,
    "soft_grpo_math": MIXTURES | SOFT_GRPO,
    "hrpo_gsm8k": PUBLISHED | GATE | GSM8K,
    "hrpo_math": PUBLISHED | GATE | MATH,
    "grpo_gsm8k": PUBLISHED | GSM8K | {"method": {"name": "grpo"}},
}


@pytest.fixture(scope="module", params=SPECIFICATION)
def recipe(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def resolved(recipe) -> dict:
    return to_dict(load_config(recipe, "data.train=train.jsonl"))


def test_recipe_holds_every_published_number(recipe, resolved):
    for path, want in SPECIFICATION[recipe].items():
        value = resolved
        for name in path.split("."):
            value = value[name]
        if path == "rewards":
            value = [{key: v for key, v in reward.items() if key != "timeout_s"} for reward in value]
        assert value == want, path


def test_system_prompt_asks_for_reasoning_then_the_delimiter_then_the_answer(recipe, resolved):
    if recipe in ("latent_grpo_gsm8k", "soft_grpo_math"):
        assert resolved["chat"]["suffix"].endswith("and put your final answer within \\boxed{}.")
        return
    system = resolved["chat"]["system"]
    assert "conversation between User and Assistant" in system and "after a #### tag" in system
    assert system.endswith("{reasoning process} #### {answer}.")
    assert "\n" not in system


def test_recipe_without_data_asks_for_it(recipe):
    with pytest.raises(UserError, match="data.train: no value given and there is no default; add data.train=..."):
        load_config(recipe)


def test_quickstarts_differ_in_the_method_alone():
    hrpo, grpo = to_dict(load_config("hrpo_quickstart")), to_dict(load_config("grpo_quickstart"))
    assert grpo["method"] == {"name": "grpo"} and hrpo["method"]["name"] == "hrpo"
    assert hrpo["eval"].pop("ablations") and not grpo["eval"].pop("ablations")
    for config in (hrpo, grpo):
        del config["method"], config["recipe"]
    assert hrpo == grpo


def test_quickstart_evaluates_before_and_after_on_everything_held_out():
    config = load_config("hrpo_quickstart")
    assert config.eval.every >= config.num_steps  # step 0 and the last are always due
    assert config.eval.num_prompts == 128


def test_every_recipe_is_described_and_checked_here():
    assert set(recipes()) == {*SPECIFICATION, *QUICKSTARTS}
    assert all(len(description) > 20 for description in recipes().values())
