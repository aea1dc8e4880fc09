"""The law: replaying a rollout under the weights that sampled it gives back its log-probabilities, and every planted fault
shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import feedback
import pytest
import tiny
import torch

from fastlatent.methods.base import METHODS, Method
from fastlatent.packing import Item, pack, varlen
from fastlatent.policy import Policy
from fastlatent.schema import AnswerConfig, ThinkingConfig
from fastlatent.types import Batch, Rollout, Sampling

FORCED = (ThinkingConfig(end="####", force="\n#### ", max_tokens=12, stop=["\n"]), AnswerConfig(max_tokens=6, stop=["\n"]))
SAMPLED = (ThinkingConfig(end="12"), AnswerConfig())  # "12" is a token of the tiny tokenizer: it is drawn now and then
EVERY = [*METHODS.names(), *feedback.NAMES]  # also what a user wrote, by its dotted path
LENGTHS = {"equal": [9, 9, 9], "unequal": [3, 17, 8]}
TEMPERATURE = 0.8
FP32_TOLERANCE = 2e-4
BF16_MEAN_TOLERANCE = 0.03
BF16_CONTROL_FACTOR = 5


def draw(policy: Policy, ends, lengths: list[int], *, top_k: int = 0, **engine) -> list[Rollout]:
    sampling = Sampling(temperature=TEMPERATURE, top_k=top_k, max_new_tokens=32)
    return tiny.engine(policy, *ends, **engine).generate(tiny.requests(tiny.prompts(lengths), 4), sampling)


def batches(rollouts: list[Rollout], how: str) -> list[Batch]:
    items = [Item(r, 1.0, 1.0) for r in rollouts]
    match how:
        case "packed":
            return [pack(items, torch.device("cpu"))]
        case "shared":
            return [pack(items, torch.device("cpu"), share_prompts=True)]
        case "single":
            return [pack([item], torch.device("cpu")) for item in items]
    raise ValueError(how)


@torch.no_grad()
def gaps(policy: Policy, replayed: list[Batch], fault: Callable[[Batch], None] | None = None) -> torch.Tensor:
    """|replayed - sampled| of every action: a token's log-probability, a latent's log-density."""
    out = []
    for batch in replayed:
        if fault:
            fault(batch)
        out.append((policy.method.score(policy, batch, TEMPERATURE).logprob_A - batch.behaviour_logprob_A).abs())
    return torch.cat(out)


def without_latents(batch: Batch) -> None:
    batch.latent_T = torch.zeros_like(batch.latent_T)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("how", ["packed", "shared", "single"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("ends", [FORCED, SAMPLED], ids=["forced", "sampled"])
@pytest.mark.parametrize("method", EVERY)
def test_replay_in_float32(method, ends, lengths, how, family):
    policy = tiny.policy(method, family=family, is_tied=family == "llama")
    rollouts = draw(policy, ends, LENGTHS[lengths])
    assert gaps(policy, batches(rollouts, how)).max() <= FP32_TOLERANCE


@pytest.mark.parametrize("how", ["packed", "shared", "single"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("ends", [FORCED, SAMPLED], ids=["forced", "sampled"])
@pytest.mark.parametrize("method", EVERY)
def test_replay_in_bfloat16(method, ends, lengths, how):
    policy = tiny.policy(method, dtype="bfloat16")
    rollouts = draw(policy, ends, LENGTHS[lengths])
    mean = gaps(policy, batches(rollouts, how)).mean()
    assert mean <= BF16_MEAN_TOLERANCE
    if any(r.trace for r in rollouts):
        assert gaps(policy, batches(rollouts, how), without_latents).mean() >= BF16_CONTROL_FACTOR * mean


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("method", EVERY)
def test_replay_of_a_truncated_policy(method, freeze):
    policy = tiny.policy(method, freeze_embedding=freeze)
    rollouts = draw(policy, FORCED, LENGTHS["unequal"], top_k=20)
    if freeze and method == "hrpo":
        assert set(rollouts[0].trace.record) == {"ids", "weights"}
    assert gaps(policy, batches(rollouts, "packed")).max() <= FP32_TOLERANCE
    assert all(k <= 0 for r in rollouts for k in r.log_kept)


@pytest.mark.parametrize("options", [{"kv": "static"}, {"max_batch": 3}, {"read_every": 5}, {"kv": "static", "read_every": 4}])
@pytest.mark.parametrize("method", EVERY)
def test_how_an_engine_batches_changes_no_token(method, options):
    policy = tiny.policy(method)
    plain, other = draw(policy, FORCED, LENGTHS["unequal"]), draw(policy, FORCED, LENGTHS["unequal"], **options)
    assert [r.token_ids for r in plain] == [r.token_ids for r in other]
    assert gaps(policy, batches(other, "packed")).max() <= FP32_TOLERANCE


# ---- planted faults: each must break the law, or the law proves nothing ---------------------------------------------------


def shifted_record(batch: Batch) -> None:
    batch.record_T = {name: column.roll(1, 0) for name, column in batch.record_T.items()}


def stale_gate(policy: Policy) -> None:
    policy.method.gate_lambda.data.add_(0.5)


def stale_weights(policy: Policy) -> None:
    policy.base.model.layers[0].mlp.up_proj.weight.data.mul_(1.05)


def attended_pads(batch: Batch) -> None:
    """What the released HRPO does: sequences padded to one length, pads read as tokens in front of the prompt."""
    where = batch.varlen
    S, pads = where.unpack_SL.shape[0], 3
    ids, position, latent = (torch.nn.functional.pad(x[where.unpack_SL], (pads, 0)).flatten()
                             for x in (batch.token_ids_T, batch.position_T + pads, batch.latent_T))
    place_T = where.repack_T // where.max_seqlen * (where.max_seqlen + pads) + where.repack_T % where.max_seqlen + pads
    batch.record_T = {
        name: torch.zeros(len(ids), *column.shape[1:], dtype=column.dtype).index_copy(0, place_T, column)
        for name, column in batch.record_T.items()}
    batch.token_ids_T, batch.position_T, batch.latent_T = ids, position, latent
    batch.varlen = varlen([where.max_seqlen + pads] * S)
    batch.score_A = place_T[batch.score_A]


LATENT = [name for name in EVERY if METHODS.find(name, "").record_spec is not Method.record_spec]
DRAWS_LATENTS = ["latent_grpo", "soft_grpo", "feedback.Gaussian"]


@pytest.mark.parametrize("fault", [without_latents, shifted_record, attended_pads])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", LATENT)
def test_a_fault_in_the_batch_is_caught(method, fault, dtype):
    policy = tiny.policy(method, dtype=dtype)
    replayed = batches(draw(policy, FORCED, LENGTHS["unequal"]), "packed")
    found = gaps(policy, replayed, fault)
    assert found.mean() > BF16_MEAN_TOLERANCE
    assert found.max() > FP32_TOLERANCE


@pytest.mark.parametrize("method", DRAWS_LATENTS)
def test_a_latent_action_gives_back_its_log_density(method):
    policy = tiny.policy(method)
    rollouts = draw(policy, FORCED, LENGTHS["unequal"])
    drawn = torch.cat([r.trace.logprob_N for r in rollouts])
    batch = batches(rollouts, "packed")[0]
    with torch.no_grad():
        density_N = policy.method.score(policy, batch, TEMPERATURE).logprob_A[batch.actions.latent_N]
    assert len(drawn) == sum(sum(r.latent_acted) for r in rollouts) == len(batch.actions.latent_N) > 50
    assert (drawn - density_N).abs().max() <= FP32_TOLERANCE
    # densities are not token log-probabilities by another name
    assert (drawn - policy.score(batch, TEMPERATURE).logprob_A[batch.actions.latent_N]).abs().mean() > 0.1


@pytest.mark.parametrize("method", DRAWS_LATENTS)
def test_a_fault_in_the_actions_is_caught(method):
    """Scores of another position, and the scores of the inputs left as they are."""
    policy = tiny.policy(method)
    replayed = batches(draw(policy, FORCED, LENGTHS["unequal"]), "packed")

    def shifted_action(batch: Batch) -> None:
        batch.actions.record_N = {name: column.roll(1, 0) for name, column in batch.actions.record_N.items()}

    assert gaps(policy, replayed, shifted_action).mean() > BF16_MEAN_TOLERANCE


@pytest.mark.parametrize("method", DRAWS_LATENTS)
def test_weights_that_have_moved_move_the_densities(method):
    policy = tiny.policy(method)
    rollouts = draw(policy, FORCED, LENGTHS["unequal"])
    stale_weights(policy)
    assert gaps(policy, batches(rollouts, "packed")).max() > FP32_TOLERANCE


@pytest.mark.parametrize("method, fault", [("hrpo", stale_gate), ("hrpo", stale_weights), ("feedback.Hidden", stale_weights)])
def test_a_stale_engine_is_caught(method, fault):
    policy = tiny.policy(method)
    rollouts = draw(policy, FORCED, LENGTHS["unequal"])
    fault(policy)
    assert gaps(policy, batches(rollouts, "packed")).max() > FP32_TOLERANCE


def test_the_gate_of_these_tests_is_strong():
    policy = tiny.policy("hrpo")
    batch = batches(draw(policy, FORCED, LENGTHS["unequal"]), "packed")[0]
    total, count = policy.method.statistics(batch.token_ids_T, batch.latent_T, batch.record_T)["latent/gate_mean"].tolist()
    assert 0.85 <= total / count <= 0.95


# ---- what follows from the law -------------------------------------------------------------------------------------------


def test_an_open_gate_is_grpo_bit_for_bit():
    """log a = 0: the latent channel carries nothing, so tokens, log-probabilities and gradients are GRPO's own."""
    plain, hybrid = tiny.policy("grpo"), tiny.policy("hrpo", strong=False)
    with torch.no_grad():
        hybrid.method.gate_lambda.fill_(torch.inf)
    ours, theirs = draw(hybrid, FORCED, LENGTHS["unequal"]), draw(plain, FORCED, LENGTHS["unequal"])
    assert [r.token_ids for r in ours] == [r.token_ids for r in theirs]
    assert [r.logprobs for r in ours] == [r.logprobs for r in theirs]
    assert any(r.trace is not None for r in ours)
    for policy, rollouts in ((plain, theirs), (hybrid, ours)):
        policy.score(batches(rollouts, "packed")[0], TEMPERATURE).logprob_A.sum().backward()
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter.grad, dict(hybrid.model.named_parameters())[name].grad), name
    assert all(p.grad.isfinite().all() for p in hybrid.method.parameters())


def test_a_rollout_depends_on_its_own_counters_only():
    policy = tiny.policy("hrpo")
    engine = tiny.engine(policy, *FORCED)
    sampling = Sampling(temperature=TEMPERATURE, max_new_tokens=32)
    together = engine.generate(tiny.requests(tiny.prompts([3, 17, 8]), 4), sampling)
    wanted = together[6]
    alone = engine.generate([wanted.request], sampling)[0]
    assert alone.token_ids == wanted.token_ids
    later = engine.generate([replace(wanted.request, step=1)], sampling)[0]
    assert later.token_ids != wanted.token_ids
