"""What is learnt from demonstrations: the cross-entropy of tokens and the divergence from mixtures, in one optimizer step.

    loss = mean over tokens of -log p(token) + latent_weight * mean over latents of KL(mixture || p)

Both means are over the whole step, so the gradient does not depend on packing. p is at temperature 1; a mixture has K ids, so
that no [N, V] tensor is made. Its KL differs from the cross-entropy against it by the mixture's entropy, a constant.

Source: the second stage of Latent-SFT (arXiv:2510.15522) and its release. There, each of a sample's latents is averaged before
samples are, and tokens within a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from fastlatent_kernels import token_logprob
from torch import Tensor

from fastlatent.microbatch import Microbatch
from fastlatent.optim import Optimizer
from fastlatent.packing import Item, microbatches
from fastlatent.policy import Policy
from fastlatent.profiling import span
from fastlatent.schema import Config
from fastlatent.sft.demonstration import TARGET_IDS, TARGET_WEIGHTS
from fastlatent.types import Batch, Rollout
from fastlatent.update import UpdateResult, optimizer_step


class SftUpdater:
    def __init__(self, policy: Policy, optimizer: Optimizer, config: Config):
        self.policy, self.optimizer, self.config = policy, optimizer, config

    def __call__(self, demonstrations: Sequence[Rollout], commit: Callable[[], None] = lambda: None) -> UpdateResult:
        """Learn from `demonstrations`; `commit` is called before the optimizer step."""
        update, result = self.config.update, UpdateResult()
        items = [Item(rollout, 0.0, 1.0) for rollout in demonstrations]
        chunks = microbatches(items, update.tokens_per_microbatch, share_prompts=False)
        parts = [Microbatch.of(chunk, self.policy.device, share_prompts=False) for chunk in chunks]
        num_latents = sum(sum(rollout.latent_acted) for rollout in demonstrations)
        num_tokens = sum(len(rollout.target_ids) for rollout in demonstrations) - num_latents
        weight_of_latent, weight_of_token = self.config.sft.latent_weight / max(num_latents, 1), 1 / num_tokens

        def learn(batch: Batch, found: UpdateResult) -> None:
            divergence_A, latent_A = divergence(self.policy, batch), is_latent(batch)
            loss = divergence_A @ torch.where(latent_A, weight_of_latent, weight_of_token)
            with span("update/backward"):
                loss.backward()
            found.loss += loss.detach()
            found.num_tokens += batch.num_tokens
            found.add_statistics(_statistics(divergence_A.detach(), latent_A))
            found.add_statistics(self.policy.method.statistics(batch.token_ids_T, batch.latent_T, batch.record_T))

        optimizer_step(parts, learn, self.optimizer, update, result, commit)
        # the schedule counts the updates that reinforcement learning makes of a step
        self.optimizer.pass_over(self.config.objective.num_epochs * self.config.objective.num_minibatches - 1)
        return result


def divergence(policy: Policy, batch: Batch) -> Tensor:
    """-log p of each token and KL(mixture || p) of each mixture, [A] in nats, differentiable."""
    hidden_AD = policy.scored_hidden(batch)
    with span("update/head"):
        if batch.actions is None:
            return -token_logprob(hidden_AD, policy.head_weight, batch.target_A, 1.0)[0]
        record_N, latent_N = batch.actions.record_N, batch.actions.latent_N
        (A,), K = batch.target_A.shape, record_N[TARGET_IDS].shape[1]
        # a token is a mixture with one weight
        target_AK = batch.target_A[:, None].expand(A, K).index_copy(0, latent_N, record_N[TARGET_IDS])
        weight_AK = torch.eye(1, K, device=hidden_AD.device).expand(A, K).index_copy(0, latent_N, record_N[TARGET_WEIGHTS])
        logprob_AK = token_logprob(hidden_AD, policy.head_weight, target_AK, 1.0)[0]
        return -(weight_AK * logprob_AK).sum(dim=1) - torch.special.entr(weight_AK).sum(dim=1)


def is_latent(batch: Batch) -> Tensor:
    """Scored places whose target is a mixture, bool [A]."""
    out_A = torch.zeros_like(batch.target_A, dtype=torch.bool)
    return out_A if batch.actions is None else out_A.index_fill(0, batch.actions.latent_N, True)


def _statistics(divergence_A: Tensor, latent_A: Tensor) -> dict[str, Tensor]:
    """Pairs (sum, count) by metric name."""
    return {name: torch.stack([(divergence_A * of_A).sum(), of_A.sum().float()])
            for name, of_A in (("sft/token_loss", ~latent_A), ("sft/latent_kl", latent_A))}
