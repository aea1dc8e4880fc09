"""The numeric ops of latent-reasoning RL, each a plain torch reference with faster backends beside it.

Imports torch only and never the trainer. `python -m fastlatent_kernels` says what every op would use here, and why.
"""

from fastlatent_kernels.clipped_surrogate import Surrogate, clipped_surrogate
from fastlatent_kernels.dispatch import OPS, BackendUnavailable, use_backend
from fastlatent_kernels.group_advantage import group_advantage
from fastlatent_kernels.hrpo_gate import hrpo_gate
from fastlatent_kernels.soft_embedding import soft_embedding
from fastlatent_kernels.token_logprob import token_logprob
from fastlatent_kernels.topk_mixture import TopkMixture, topk_mixture
from fastlatent_kernels.vocab_head import VocabHead, vocab_head

__all__ = [
    "OPS", "BackendUnavailable", "Surrogate", "TopkMixture", "VocabHead", "clipped_surrogate", "group_advantage",
    "hrpo_gate", "soft_embedding", "token_logprob", "topk_mixture", "use_backend", "vocab_head"]
