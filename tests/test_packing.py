"""How rollouts are packed changes no number: not the log-probabilities, not the gradient, not the normaliser."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlatent.errors import UserError
from fastlatent.objectives import surrogate, token_weights
from fastlatent.packing import Item, microbatches, pack
from fastlatent.schema import AnswerConfig, ObjectiveConfig, ThinkingConfig
from fastlatent.types import Sampling

ENDS = (ThinkingConfig(end="####", force="\n#### ", max_tokens=12, stop=["\n"]), AnswerConfig(max_tokens=6, stop=["\n"]))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy():
    return tiny.policy("hrpo")


@pytest.fixture(scope="module")
def items(policy):
    rollouts = tiny.engine(policy, *ENDS).generate(
        tiny.requests(tiny.prompts([3, 17, 8, 11]), 4), Sampling(temperature=0.8, max_new_tokens=32))
    weights = token_weights(rollouts, ObjectiveConfig(), 32)
    return [Item(r, 1.0 - 0.3 * (i % 5), w) for i, (r, w) in enumerate(zip(rollouts, weights, strict=True))]


def gradient(policy, batches) -> torch.Tensor:
    policy.zero_grad()
    for batch in batches:
        surrogate(policy.score(batch, 0.8), batch, ObjectiveConfig()).value.backward()
    return torch.cat([p.grad.flatten() for p in policy.trainable().values()])


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("budget", [40, 100, 10_000])
def test_the_gradient_does_not_depend_on_packing(policy, items, budget, share):
    alone = gradient(policy, [pack([item], CPU) for item in items])
    packed = gradient(policy, [pack(chunk, CPU, share) for chunk in microbatches(items, budget, share)])
    assert alone.norm() > 1e-3
    torch.testing.assert_close(packed, alone, atol=2e-6 * alone.norm().item(), rtol=1e-3)


@pytest.mark.parametrize("share", [False, True])
def test_every_item_is_packed_once_within_the_budget(items, share):
    chunks = microbatches(items, 60, share)
    assert sorted(map(id, (item for chunk in chunks for item in chunk))) == sorted(map(id, items))
    assert all(pack(chunk, CPU, share).num_tokens <= 60 for chunk in chunks)
    assert len(chunks) > 1


def test_sharing_reads_a_prompt_once(items):
    shared, repeated = pack(items, CPU, share_prompts=True), pack(items, CPU)
    prompts = {item.prompt_id: item.num_prompt for item in items}
    assert repeated.num_tokens - shared.num_tokens == 3 * sum(prompts.values())
    assert torch.equal(shared.target_A, repeated.target_A)


class Written(TorchDispatchMode):
    """The places that each indexed assignment writes to."""

    def __init__(self):
        super().__init__()
        self.places: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.index_put_.default:
            self.places.append(args[1][0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("share", [False, True])
def test_a_record_lies_where_its_token_is_read_and_nowhere_else(policy, share):
    """Completions cut while they think: nobody reads the latent of their last token, and behind it comes the next one's
    first."""
    drawn = tiny.engine(policy, ThinkingConfig(end="####"), AnswerConfig()).generate(
        tiny.requests(tiny.prompts([3, 5]), 4), Sampling(temperature=0.8, max_new_tokens=6))
    assert sum(r.latent[-1] for r in drawn) > 5
    with Written() as written:
        batch = pack([Item(r, 1.0, 1.0) for r in drawn], CPU, share)
    # of several values for one place a GPU keeps any
    assert written.places and all(len(places.unique()) == len(places) for places in written.places)
    rows = torch.cat([r.trace.record["mixture"][: sum(r.latent[:-1])] for r in drawn])
    wanted_TD = torch.zeros(batch.num_tokens, rows.shape[1])
    wanted_TD[batch.latent_T.nonzero()[:, 0]] = rows
    assert torch.equal(batch.record_T["mixture"], wanted_TD)


def test_a_budget_below_one_sequence_is_refused(items):
    with pytest.raises(UserError, match="tokens_per_microbatch: a sequence of [0-9]+ tokens does not fit into 5"):
        microbatches(items, 5, False)


def test_no_tensor_of_tokens_times_vocabulary_in_an_update(policy):
    """The head works in row chunks: nothing of A * V / 4 elements lives in forward or backward."""
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.size = max([self.size, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    rollouts = tiny.engine(policy, *ENDS).generate(
        tiny.requests(tiny.prompts([4, 4]), 60), Sampling(temperature=0.8, max_new_tokens=32))
    batch = pack([Item(r, 1.0, 1.0) for r in rollouts], CPU, share_prompts=True)
    assert batch.score_A.numel() >= 1000
    hidden_AD = policy.hidden(batch)[batch.score_A].detach().requires_grad_()
    with Largest() as largest:
        from fastlatent_kernels import token_logprob
        token_logprob(hidden_AD, policy.head_weight, batch.target_A, 0.8)[0].sum().backward()
    assert 0 < largest.size < batch.score_A.numel() * policy.head_weight.shape[0] / 4


# ---- weights of tokens ---------------------------------------------------------------------------------------------------


def test_normalisers_by_hand(items):
    rollouts = sorted((item.rollout for item in items), key=lambda r: sum(r.acted))
    rollouts = [rollouts[0], rollouts[-1]]
    a, b = (sum(r.acted) for r in rollouts)
    assert a < b
    assert token_weights(rollouts, ObjectiveConfig(normalizer="token_mean"), 32) == [1 / (a + b)] * 2
    assert token_weights(rollouts, ObjectiveConfig(normalizer="sequence_mean"), 32) == [1 / (2 * a), 1 / (2 * b)]
    assert token_weights(rollouts, ObjectiveConfig(normalizer="constant"), 32) == [1 / 64] * 2
    assert token_weights(rollouts, ObjectiveConfig(normalizer="constant", constant_length=10), 32) == [1 / 20] * 2


def test_truncated_completions_can_be_left_out(items):
    rollouts = [item.rollout for item in items]
    cut = [r.finish == "length" for r in rollouts]
    assert any(cut) and not all(cut)
    weights = token_weights(rollouts, ObjectiveConfig(mask_truncated_completions=True), 32)
    assert [w == 0 for w in weights] == cut
    assert sum(w * sum(r.acted) for w, r in zip(weights, rollouts, strict=True)) == pytest.approx(1.0)
