"""How much of a GPU an update uses: the operations that a model's forward and backward pass need, over what it could do.

The usual count (PaLM, arXiv:2204.02311, appendix B): two operations a weight and token forward, twice that backward, and the
two products of attention, halved because it is causal. The head counts for the tokens that are learnt from, recomputation
and the method's own gate not at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlatent.types import Rollout

PEAK_FLOP_S = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12}
"""Dense bfloat16, by the vendor's data sheet; the device's name begins with the key."""


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
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head * pairs
    return 3 * (2 * num_body_weights * num_tokens + 2 * config.hidden_size * config.vocab_size * num_acted + attention)


def peak_flop_s() -> float | None:
    """What this GPU could do; None where that is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAK_FLOP_S.items() if name.startswith(known)), None)
