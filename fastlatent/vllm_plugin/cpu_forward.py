"""The forward pass of vLLM's Llama, Qwen2 and Qwen3 on a CPU: their own layers, without what surrounds each call of one.

vLLM's goes through a module's call, a choice of implementation and, for attention, torch's dispatcher and back into Python, so
that compilers and graphs find their way. Nothing is compiled or captured here, and they take about 0.25 ms a layer: of a decode
step of SmolLM2-135M with 16 rows a sixth. What is computed is the same, by the same operators in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from vllm.forward_context import ForwardContext, get_forward_context

from fastlatent.vllm_plugin.cpu_norm import fused_add_rms_norm, rms_norm


def forward_of(base: type[nn.Module]) -> Callable[..., Tensor]:
    """A forward for subclasses of this model class of vLLM's."""

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        context = get_forward_context()
        if inputs_embeds is None or context.attn_metadata is None:  # vLLM warms itself up so
            return base.forward(self, input_ids, positions, intermediate_tensors, inputs_embeds)
        return hidden_states(self.model, positions, inputs_embeds, context)

    return forward


def hidden_states(model: nn.Module, position_T: Tensor, input_TD: Tensor, context: ForwardContext) -> Tensor:
    """[T, D] behind the last norm; `input_TD` is overwritten, as vLLM's own forward does it."""
    residual_TD, x_TD = input_TD, None
    for layer in model.layers:
        x_TD = _add_and_norm(layer.input_layernorm, x_TD, residual_TD)
        x_TD = _attend(layer.self_attn, position_T, x_TD, context)
        x_TD = _add_and_norm(layer.post_attention_layernorm, x_TD, residual_TD)
        x_TD = _linear(layer.mlp.down_proj, layer.mlp.act_fn.forward(_linear(layer.mlp.gate_up_proj, x_TD)))
    return _add_and_norm(model.norm, x_TD, residual_TD)


def _add_and_norm(norm: nn.Module, x_TD: Tensor | None, residual_TD: Tensor) -> Tensor:
    """The norm of the residual stream, to which `x_TD` is added in place."""
    if x_TD is None:
        return rms_norm(residual_TD, norm.weight, norm.variance_epsilon)
    return fused_add_rms_norm(x_TD, residual_TD, norm.weight, norm.variance_epsilon)[0]


def _linear(linear: nn.Module, x_TD: Tensor) -> Tensor:
    return linear.quant_method.apply(linear, x_TD, linear.bias)


def _attend(attention: nn.Module, position_T: Tensor, x_TD: Tensor, context: ForwardContext) -> Tensor:
    q_TD, k_TD, v_TD = torch.split_with_sizes(
        _linear(attention.qkv_proj, x_TD), [attention.q_size, attention.kv_size, attention.kv_size], -1)
    if "q_norm" in attention._modules:
        q_TD = attention.q_norm(_by_head(q_TD, attention.head_dim)).view(q_TD.shape)
        k_TD = attention.k_norm(_by_head(k_TD, attention.head_dim)).view(k_TD.shape)
    q_TD, k_TD = attention.rotary_emb.forward(position_T, q_TD, k_TD)
    layer = attention.attn
    backend, name, size, cache = layer.impl, layer.layer_name, layer.head_size, layer.kv_cache
    out_TD = q_TD.new_empty(q_TD.shape)
    q, k, v, out = _by_head(q_TD, size), _by_head(k_TD, size), _by_head(v_TD, size), _by_head(out_TD, size)
    backend.do_kv_cache_update(layer, k, v, cache, context.slot_mapping[name])
    backend.forward(layer, q, k, v, cache, context.attn_metadata[name], output=out)
    return _linear(attention.o_proj, out_TD)


def _by_head(x_TD: Tensor, head_size: int) -> Tensor:
    return x_TD.view(x_TD.shape[0], -1, head_size)
