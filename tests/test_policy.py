"""The policy is the stock model: packing, adapters, reference and publishing change no number that they should not."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, GraniteConfig,
    GraniteForCausalLM, MistralConfig, MistralForCausalLM, PhiConfig, PhiForCausalLM, Qwen2Config, Qwen2ForCausalLM)

from fastlatent import models
from fastlatent.config import load_config
from fastlatent.errors import UserError
from fastlatent.methods.base import METHODS
from fastlatent.models.supported import check_supported
from fastlatent.objectives import surrogate
from fastlatent.packing import Item, pack
from fastlatent.policy import Policy
from fastlatent.schema import AnswerConfig, LoraConfig, ModelConfig, ObjectiveConfig, ThinkingConfig
from fastlatent.trainer import Trainer
from fastlatent.types import Batch, Sampling

THINKING = ThinkingConfig(end="####", force="\n#### ", max_tokens=12, stop=["\n"])
ANSWER = AnswerConfig(max_tokens=6, stop=["\n"])
LENGTHS = [3, 17, 8]
CPU = torch.device("cpu")


def rollouts(policy: Policy, group_size: int = 3, **engine) -> list:
    return tiny.engine(policy, THINKING, ANSWER, **engine).generate(
        tiny.requests(tiny.prompts(LENGTHS), group_size), Sampling(temperature=0.8, max_new_tokens=32))


def packed(drawn: list, share_prompts: bool) -> Batch:
    return pack([Item(r, 1.0 - i % 2 * 2.0, 0.1) for i, r in enumerate(drawn)], CPU, share_prompts)


def plain(model):
    """The same weights in a model that transformers runs by itself, with its own eager attention."""
    own = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager")
    own.load_state_dict(model.state_dict())
    return own.eval()


def token_logprobs(model, rollout, temperature: float) -> torch.Tensor:
    """Log-probabilities of a completion by one unpacked forward pass of a plain model, float64 from the logits on."""
    prompt = list(rollout.request.prompt.token_ids)
    logits = model(torch.tensor([prompt + rollout.token_ids])).logits[0].double() / temperature
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    acted = torch.tensor(rollout.acted)
    return rows.gather(1, torch.tensor(rollout.target_ids)[:, None])[:, 0][acted]


# ---- forward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_packed_hidden_states_are_those_of_the_plain_model(family, is_tied, share_prompts):
    policy = tiny.policy("grpo", family=family, is_tied=is_tied)
    assert (policy.base.get_input_embeddings().weight is policy.head_weight) == is_tied
    model, drawn = plain(tiny.model(family, is_tied=is_tied)), rollouts(policy)
    batch = packed(drawn, share_prompts)
    hidden_AD, end = policy.hidden(batch)[batch.score_A], 0
    for rollout in drawn:
        prompt = list(rollout.request.prompt.token_ids)
        alone = model.model(torch.tensor([prompt + rollout.token_ids])).last_hidden_state[0]
        wanted = alone[len(prompt) - 1 : -1][torch.tensor(rollout.acted)]
        start, end = end, end + len(wanted)
        torch.testing.assert_close(hidden_AD[start:end], wanted, atol=1e-5, rtol=1e-5)
    assert end == len(hidden_AD)


@torch.no_grad()
def test_scores_are_the_plain_models_log_probabilities():
    policy = tiny.policy("grpo")
    model, drawn = plain(tiny.model()), rollouts(policy)
    scored = policy.score(packed(drawn, share_prompts=True), 0.7)
    wanted = torch.cat([token_logprobs(model, r, 0.7) for r in drawn])
    torch.testing.assert_close(scored.logprob_A.double(), wanted, atol=1e-4, rtol=0)


def gradients(policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    surrogate(policy.score(batch, 0.8), batch, ObjectiveConfig()).value.backward()
    return {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, alpha=8)])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradient(lora):
    stored, recomputed = (tiny.policy("hrpo", lora=lora, gradient_checkpointing=on).train() for on in (False, True))
    batch = packed(rollouts(stored), share_prompts=True)
    passes = []
    for policy in (stored, recomputed):
        if lora is not None:
            with torch.no_grad():  # B is 0 at first, and A would have no gradient
                for name, parameter in policy.trainable().items():
                    if "lora_B" in name:
                        parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
        policy.base.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_, policy=policy: passes.append(policy))
    wanted, got = gradients(stored, batch), gradients(recomputed, batch)
    assert passes.count(stored) == 1 and passes.count(recomputed) == 2
    assert wanted.keys() == got.keys() == stored.trainable().keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


# ---- what is trained and published ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_frozen_embedding_gets_no_gradient_and_the_head_with_it(is_tied):
    policy = tiny.policy("hrpo", is_tied=is_tied, freeze_embedding=True)
    batch = packed(rollouts(policy), share_prompts=True)
    names = gradients(policy, batch).keys()
    assert len(names) > 10 and not any("embed_tokens" in name or "lm_head" in name for name in names)
    assert policy.base.get_input_embeddings().weight.grad is None and policy.head_weight.grad is None
    free = gradients(tiny.policy("hrpo", is_tied=is_tied), batch)
    assert any("embed_tokens" in name for name in free) and any("lm_head" in name for name in free) == (not is_tied)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_published_adapters_are_what_peft_merges(family, is_tied):
    policy = tiny.policy("hrpo", family=family, is_tied=is_tied, lora=LoraConfig(r=4, alpha=12))
    base = {name: tensor.clone() for name, tensor in tiny.model(family, is_tied=is_tied).named_parameters()}
    with torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    published = dict(policy.published())
    for name, tensor in policy.base.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(tensor, base[name.replace(".base_layer", "")]), name  # nothing was merged in place
    merged = dict(copy.deepcopy(policy.model).merge_and_unload().named_parameters())
    assert {name for name in published if not name.startswith("method.")} == merged.keys()
    num_changed = 0
    for name, tensor in merged.items():
        torch.testing.assert_close(published[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
        num_changed += not torch.allclose(tensor, base[name])
    assert num_changed == 2 * 7  # layers times adapted matrices
    own = {name.removeprefix("method.") for name in published if name.startswith("method.")}
    assert own == policy.method.state_dict().keys()


def test_an_engine_fed_with_merged_adapters_draws_what_the_policy_scores():
    policy = tiny.policy("hrpo", lora=LoraConfig(r=4, alpha=12))
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        batch = packed(rollouts(policy), share_prompts=True)
        gap = (policy.score(batch, 0.8).logprob_A - batch.behaviour_logprob_A).abs()
        assert gap.max() <= 2e-4
        with policy.model.disable_adapter():
            assert (policy.score(batch, 0.8).logprob_A - batch.behaviour_logprob_A).abs().max() > 0.1


# ---- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, alpha=8)], ids=["copy", "adapter-off"])
@pytest.mark.parametrize("method", METHODS.names())
def test_the_reference_stays_the_base_model_while_the_policy_moves(method, lora):
    policy = tiny.policy(method, has_reference=True, lora=lora)
    drawn = rollouts(policy)
    batch = packed(drawn, share_prompts=True)
    model = plain(tiny.model())
    with torch.no_grad():
        wanted = torch.cat([token_logprobs(model, r, 0.8) for r in drawn])
    before = policy.reference_logprob(batch, 0.8)
    torch.testing.assert_close(before.double(), wanted, atol=1e-4, rtol=0)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=0.02)
    for _ in range(2):
        gradients(policy, batch)
        optimizer.step()
    assert torch.equal(policy.reference_logprob(batch, 0.8), before)
    assert not before.requires_grad
    with torch.no_grad():
        moved = policy.score(batch, 0.8).logprob_A
    assert (moved.double() - wanted).abs().max() > 0.1


def test_without_a_kl_term_no_copy_is_kept():
    assert tiny.policy("grpo")._reference is None
    assert tiny.policy("grpo", has_reference=True, lora=LoraConfig(r=4))._reference is None


def test_masters_are_float32_and_a_bfloat16_base_under_adapters_is_not():
    full = tiny.policy("hrpo", dtype="bfloat16")
    assert {p.dtype for p in full.trainable().values()} == {torch.float32}
    adapted = tiny.policy("hrpo", dtype="bfloat16", lora=LoraConfig(r=4))
    assert {p.dtype for p in adapted.trainable().values()} == {torch.float32}
    assert {p.dtype for name, p in adapted.base.named_parameters() if ".lora_" not in name} == {torch.bfloat16}


def test_the_fused_loss_is_the_surrogate_of_the_scores():
    policy = tiny.policy("hrpo", is_tied=True)
    batch = packed(rollouts(policy), share_prompts=True)
    noise_A = torch.randn(len(batch.target_A), generator=torch.Generator().manual_seed(0))
    batch.old_logprob_A = batch.behaviour_logprob_A + 0.3 * noise_A
    objective, results = ObjectiveConfig(entropy_coef=0.1, dual_clip=3.0), []
    for loss in (policy.loss(batch, 0.8, objective), surrogate(policy.score(batch, 0.8), batch, objective)):
        policy.zero_grad()
        loss.value.backward()
        results.append((loss, {name: p.grad.clone() for name, p in policy.trainable().items()}))
    (fused, fused_gradient), (plain, gradient) = results
    torch.testing.assert_close(fused.value, plain.value)
    torch.testing.assert_close(fused.logprob_A, plain.logprob_A)
    assert fused.sums.keys() == plain.sums.keys()
    for name, value in plain.sums.items():
        torch.testing.assert_close(fused.sums[name], value, msg=name)
    assert any(g.abs().max() > 1e-3 for g in gradient.values())
    for name, value in gradient.items():
        torch.testing.assert_close(fused_gradient[name], value, atol=1e-6 * gradient[name].abs().max().item() + 1e-7, rtol=1e-3)


# ---- what is refused ------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}


@pytest.mark.parametrize("make, reason", [
    (lambda: PhiForCausalLM(PhiConfig(**SMALL)), "wanted a head that is one linear layer without bias"),
    (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16)), "it sets final_logit_softcapping"),
    (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, embedding_multiplier=2.0)), "it scales its input embeddings"),
    (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)), "it sets logits_scaling"),
    (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)),
     "wanted its blocks in a module called 'model'"),
])
def test_a_head_that_the_ops_would_get_wrong_is_refused(make, reason):
    model = make()
    with pytest.raises(UserError) as caught:
        check_supported(model, ModelConfig())
    assert str(caught.value) == f"model.path: {type(model).__name__} is not supported: {reason}"


def test_a_window_without_layer_types_is_refused():
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8))
    method = METHODS.find("grpo", "method.name")
    with pytest.raises(UserError, match="MistralForCausalLM is not supported: it has sliding_window layers"):
        Policy(model, ModelConfig(), method, method.Config(), has_reference=False)


def test_sliding_windows_are_refused():
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1))
    method = METHODS.find("grpo", "method.name")
    with pytest.raises(UserError, match="Qwen2ForCausalLM is not supported: it has sliding_attention layers"):
        Policy(model, ModelConfig(), method, method.Config(), has_reference=False)


def test_adapters_for_layers_that_are_not_there_are_refused():
    reason = "model.lora.target_modules: Qwen2ForCausalLM has no linear layer 'c_attn'; it has q_proj, k_proj"
    with pytest.raises(UserError, match=reason):  # one wrong name among right ones is enough
        tiny.policy("grpo", lora=LoraConfig(r=4, target_modules=["q_proj", "c_attn"]))


def test_what_cannot_be_trained_is_refused_before_weights_are_loaded(tmp_path, monkeypatch):
    def load(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(models, "load_causal_lm", load)
    path = tiny.save(tmp_path / "model")
    overrides = [f"model.path={path}", "model.lora={target_modules: [c_attn]}", f"out={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="no linear layer 'c_attn'"):
        Trainer(load_config("grpo_quickstart", overrides=overrides))
    assert not (tmp_path / "run").exists()
