"""The numeric ops of latent-reasoning RL, each a plain torch reference with faster backends beside it.

Imports torch only and never the trainer. `python -m fastlatent_kernels` says what every op would use here, and why.

A folder is an op. `dispatch` and `measured` choose among its backends, `overview` tells. All ops share the checks of `check`,
the `noise` of a rollout and the `library` their operators are in; backends of a kind share `native` (C++ on a CPU),
`cuda_support`, the `structs` of both, and `triton_support` with `aot`, which compiles where there is no GPU. `decode_logits` is
part of no op.
"""

from fastlatent_kernels.clipped_surrogate import Surrogate, clipped_surrogate
from fastlatent_kernels.dispatch import OPS, BackendUnavailable, use_backend
from fastlatent_kernels.gaussian_reparam import GaussianReparam, gaussian_reparam
from fastlatent_kernels.group_advantage import group_advantage
from fastlatent_kernels.hrpo_gate import hrpo_gate
from fastlatent_kernels.hrpo_gate_decode import hrpo_gate_decode
from fastlatent_kernels.policy_gradient_head import PolicyGradient, policy_gradient_head
from fastlatent_kernels.soft_embedding import soft_embedding
from fastlatent_kernels.token_logprob import token_logprob
from fastlatent_kernels.topk_gumbel import ClippedGumbel, TopkGumbel, topk_gumbel
from fastlatent_kernels.topk_mixture import TopkMixture, topk_mixture
from fastlatent_kernels.vocab_head import VocabHead, vocab_head

__all__ = [
    "OPS", "BackendUnavailable", "ClippedGumbel", "GaussianReparam", "PolicyGradient", "Surrogate", "TopkGumbel",
    "TopkMixture", "VocabHead", "clipped_surrogate", "gaussian_reparam", "group_advantage", "hrpo_gate",
    "hrpo_gate_decode", "policy_gradient_head", "soft_embedding", "token_logprob", "topk_gumbel", "topk_mixture",
    "use_backend", "vocab_head"]
