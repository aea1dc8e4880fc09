"""How much of a GPU an update uses: the operations that a model's forward and backward pass need, over what it could do.

The usual count (PaLM, arXiv:2204.02311, appendix B): two operations a weight and token forward, twice that backward, and the
two products of attention, halved because it is causal. The head counts for the tokens that are learnt from, recomputation
and the method's own gate not at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlatent import mfu
from fastlatent.types import Rollout


def update_flops(config, num_body_weights: int, rollouts: Sequence[Rollout]) -> float:
    """Operations of one update on `rollouts`; each group's prompt is read once.

    Args:
        config: of the transformers model.
        num_body_weights: parameters without embedding and head.
    """
    prompt_lengths = {r.request.prompt.id: len(r.request.prompt.token_ids) for r in rollouts}
    num_tokens = sum(prompt_lengths.values()) + sum(len(r.token_ids) for r in rollouts)
    num_acted = sum(sum(r.acted) for r in rollouts)
    # key places seen by all tokens together: a prompt's own triangle once, and each completion's rows behind it
    pairs = sum(n * (n + 1) / 2 for n in prompt_lengths.values())
    pairs += sum(len(r.token_ids) * (prompt_lengths[r.request.prompt.id] + (len(r.token_ids) + 1) / 2) for r in rollouts)
    weights = 2 * num_body_weights * num_tokens + 2 * config.hidden_size * config.vocab_size * num_acted
    return 3 * weights + mfu.pair_flops(config) * pairs


def peak_flop_s() -> float | None:
    """What this GPU could do in bfloat16; None where that is not known."""
    return mfu.peak_flop_s(torch.device("cuda"), torch.bfloat16) if torch.cuda.is_available() else None
