"""The recipes hold the published hyper-parameters, written down here a second time from the specification."""

import re
from importlib.resources import files

import pytest

from fastlatent.config import load_config, to_dict
from fastlatent.config.layers import recipes
from fastlatent.errors import UserError

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
# arXiv:2604.27998 and its release, which is built on that of arXiv:2511.06411
LATENT_GRPO = {
    "num_prompts": 64, "group_size": 8, "model.dtype": "bfloat16", "model.lora": None, "model.freeze_embedding": True,
    "chat.suffix": "\nPlease reason step by step, and put your final answer within \\boxed{}.", "chat.max_prompt_tokens": 192,
    "thinking.end": "</", "thinking.max_tokens": None, "sampling.temperature": 0.6, "sampling.top_k": 30,
    "sampling.top_p": 0.95, "sampling.max_new_tokens": 128, "objective.advantage": "z_score", "objective.advantage_eps": 1e-6,
    "objective.normalizer": "token_mean", "objective.clip_low": 0.2, "objective.clip_high": 0.2, "objective.dual_clip": 3.0,
    "objective.entropy_coef": 0.0, "objective.kl_coef": 0.0, "objective.score_temperature": None,
    "objective.num_minibatches": 64 // 16, "objective.filter_zero_variance": True, "objective.max_filter_rounds": 50 - 1,
    "optim.lr": 1e-6, "optim.weight_decay": 0.01, "optim.schedule": "constant", "optim.max_grad_norm": 1.0,
    "method.name": "latent_grpo", "method.top_k": 10, "method.top_p": 0.95, "method.candidates": "union",
    "method.noise_low": -1.5, "method.noise_high": 3.0, "method.noise_scale": 1.0, "method.one_sided": True,
    "method.delta": 0.0, "method.mixture_temperature": 1.0, "method.end_rule": "likeliest", "method.truncated": "masked",
    "method.bound_negative": True, "method.select_first": True, "method.clamp_density": False, "method.logprob_floor": None,
    "method.is_latent_init": True, "rewards": [{"name": "math_equal", "weight": 1.0, "require_delimiter": False}],
}
LATENT_GRPO_INFERRED = {"model.path": "DJCheng/LLaMA3.2-1B-Instruct-Latent-SFT-Top10", "objective.num_epochs": 1}
SOFT_GRPO = {
    "num_prompts": 64, "group_size": 8, "model.path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "thinking.end": "</think>",
    "sampling.max_new_tokens": 8192, "objective.advantage": "z_score", "objective.kl_coef": 0.001,
    "objective.kl_estimator": "k3", "objective.num_minibatches": 64 // 32, "optim.lr": 1e-6, "method.name": "soft_grpo",
    "method.top_k": 5, "method.top_p": 0.95, "method.candidates": "renormalised", "method.noise_low": -1.5,
    "method.noise_high": 3.0, "method.noise_scale": 1.0, "method.one_sided": False, "method.mixture_temperature": 0.1,
    "method.clamp_density": True, "method.logprob_floor": -3.0, "method.truncated": "kept", "method.bound_negative": False,
    "method.select_first": False,
}
SOFT_GRPO_INFERRED = {path: LATENT_GRPO[path] for path in (
    "model.dtype", "model.freeze_embedding", "sampling.temperature", "sampling.top_k", "sampling.top_p",
    "objective.advantage_eps", "objective.normalizer", "objective.clip_low", "objective.clip_high", "objective.dual_clip",
    "objective.entropy_coef",
    "objective.score_temperature", "optim.weight_decay", "optim.schedule", "optim.max_grad_norm", "rewards")} | {
    "objective.num_epochs": 1, "objective.filter_zero_variance": False, "model.lora": None, "thinking.max_tokens": None}
STATED = {"latent_grpo_gsm8k": (LATENT_GRPO, LATENT_GRPO_INFERRED), "soft_grpo_math": (SOFT_GRPO, SOFT_GRPO_INFERRED)}
QUICKSTARTS = ("hrpo_quickstart", "grpo_quickstart", "latent_sft_quickstart", "latent_grpo_quickstart")
SPECIFICATION = {
    "latent_grpo_gsm8k": LATENT_GRPO | LATENT_GRPO_INFERRED,
    "soft_grpo_math": SOFT_GRPO | SOFT_GRPO_INFERRED,
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


def tags(recipe: str) -> dict[str, str]:
    """The source that a recipe's file names for each of its options, the first word of the comment beside it; "" for none."""
    out, section = {}, ""
    for line in (files("fastlatent") / "recipes" / f"{recipe}.yaml").read_text().splitlines():
        setting, _, comment = line.partition(" # ")
        if not (found := re.fullmatch(r"(\s*)(?:- )?(\w+):(.*)", setting)):
            continue
        indent, key, value = found.groups()
        if not value.strip():
            section = key
            continue
        path = key if not indent else section if section == "rewards" else f"{section}.{key}"
        source = re.match(r"\w*", comment)[0]
        assert out.setdefault(path, source) == source, path
    return out


@pytest.mark.parametrize("recipe", STATED)
def test_an_option_is_told_to_be_published_where_it_was_and_nowhere_else(recipe):
    stated, inferred = STATED[recipe]
    found = {path: source for path, source in tags(recipe).items() if not path.startswith("data.") and path != "method.name"}
    for path, source in found.items():
        assert source == ("code" if path in stated else "inferred" if path in inferred else "ours"), path
    # what a file leaves at its default is published, too
    assert len(found.keys() & stated.keys()) > 20 and {"seed", "update.tokens_per_microbatch"} <= found.keys() - stated.keys()


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
