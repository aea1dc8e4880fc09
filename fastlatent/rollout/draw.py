"""What every engine does once it has hidden states: draw a token of each row, let the method decide, write down what
happened."""

from __future__ import annotations

import torch
from fastlatent_kernels import topk_mixture, vocab_head
from fastlatent_kernels.decode_logits import decode_logits
from torch import Tensor

from fastlatent.methods.base import Decision, Method, State, StepView
from fastlatent.rollout.buffers import Buffers
from fastlatent.rollout.thinking import ThinkingSpan
from fastlatent.types import Capability, Sampling


def look(hidden_BD: Tensor, weight_VD: Tensor, table_VD: Tensor, needs: frozenset[Capability], sampling: Sampling,
         seed: Tensor, counter_B3: Tensor) -> StepView:
    """Draw a token from each hidden state, with whatever `needs` asks to see of the distribution it was drawn from.

    `weight_VD` is the LM head's, maybe in oneDNN's layout; `table_VD` the input embedding.
    """
    extra = {}
    if sampling.is_truncated or Capability.LOGITS in needs:
        logits_BV = decode_logits(hidden_BD, weight_VD)
        extra["logits_BV"] = logits_BV
    if sampling.is_truncated:
        head = topk_mixture(logits_BV, sampling.temperature, sampling.top_k, sampling.top_p, seed, counter_B3, sampling.greedy)
        extra |= {"ids_BK": head.ids_BK, "weights_BK": head.weights_BK}
        log_kept_B = head.log_kept_B
    else:
        mixed_VD = table_VD if Capability.MIXTURE in needs else None
        head = vocab_head(hidden_BD, weight_VD, sampling.temperature, seed, counter_B3, sampling.greedy, mixed_VD)
        extra["mixture_BD"] = head.mixture_BD
        log_kept_B = torch.zeros_like(head.logprob_B)
    return StepView(
        token_B=head.token_B, read_B=head.token_B, logprob_B=head.logprob_B, log_kept_B=log_kept_B,
        entropy_B=head.entropy_B, hidden_BD=hidden_BD, thinking_B=torch.zeros_like(head.token_B, dtype=torch.bool),
        seed=seed, counter_B3=counter_B3, sampling=sampling, **extra)


def settle(view: StepView, span: ThinkingSpan, span_state: dict[str, Tensor], method: Method, state: State, buffers: Buffers,
           slot_B: Tensor, time_B: Tensor) -> tuple[Tensor, Decision]:
    """Step the thinking span and the method by what was drawn, and write it to `buffers` at (slot, time).

    Changes `span_state` and `state` in place. Returns the tokens to be read next, [B], and what the method decided of them.
    """
    live_B = ~span_state["done"]
    view.thinking_B, view.is_end_V = span.is_thinking(span_state), span.is_end_V
    method.draw(view, state)
    advance = span.advance(view.token_B, span_state)
    view.read_B, view.thinking_B = advance.read_B, advance.thinking_B
    decision = method.decide(view, state)
    acted_B = advance.acted_B if decision.acted_B is None else advance.acted_B & decision.acted_B
    buffers.write(slot_B, time_B, live_B, view, advance, decision, acted_B)
    return advance.read_B, decision
