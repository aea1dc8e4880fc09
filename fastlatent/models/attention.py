"""One attention function for every Hugging Face model here, under the name `fastlatent`, and the two layouts it serves.

A model calls it from each layer with the `layout` its forward was given: `Packed` (sequences back to back, no pads: update,
scoring, prefill) or `Decode` (one new token a row against a key-value cache). Pads are never attended because there are none.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from fastlatent.errors import UserError
from fastlatent.models import head_size, short_attention
from fastlatent.models.flash import Flash
from fastlatent.types import Varlen

NAME = "fastlatent"


class KVCache:
    """Keys and values of `num_rows` sequences, row r holding its first tokens at places 0, 1, ...: per layer
    [rows, heads, room, head]."""

    def __init__(self, config, num_rows: int, room: int, dtype: torch.dtype, device: torch.device):
        shape = (num_rows, config.num_key_value_heads, room, head_size(config))
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def view(self) -> KVCache:
        """The same tensors in a cache of its own: what it selects leaves this one as it is."""
        out = copy(self)
        out.keys, out.values = list(self.keys), list(self.values)
        return out

    def select(self, index_B: Tensor, used: int, room: int | None = None) -> None:
        """Keep, repeat or reorder rows, moving the first `used` places; `room` changes how many there are."""
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros(len(index_B), old.shape[1], room or old.shape[2], old.shape[3])
                new[:, :, :used] = old[:, :, :used].index_select(0, index_B)
                tensors[layer] = new


@dataclass(slots=True)
class Packed:
    """S causal segments back to back in one row of T tokens; `cache` (one row a segment) receives their keys and values."""

    varlen: Varlen
    cache: KVCache | None = None
    flash: Flash | None = None  # computes it, without a cache; None: torch's attention

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        where = self.varlen
        if self.flash is not None and self.cache is None:
            return self.flash.attend(where, query, key, value, scaling)
        key_SL, value_SL = (_gather(x, where.unpack_SL) for x in (key, value))
        if self.cache is not None:
            # compiled blocks, which have no cache, must not read their own number: each would be compiled anew
            layer = module.layer_idx
            self.cache.keys[layer][:, :, : where.max_seqlen] = key_SL
            self.cache.values[layer][:, :, : where.max_seqlen] = value_SL
        mask = None
        if where.prefix_SP is not None:
            key_SL = torch.cat([_gather(key, where.prefix_SP), key_SL], dim=2)
            value_SL = torch.cat([_gather(value, where.prefix_SP), value_SL], dim=2)
            mask = where.mask_SLK[:, None]
        query_SL = _gather(query, where.unpack_SL)
        if short_attention.is_faster(query_SL, key_SL):
            out = short_attention.attend(query_SL, key_SL, value_SL, where.mask_SLK, scaling)
        else:
            groups = query.shape[1] // key.shape[1]
            if groups > 1:
                key_SL, value_SL = key_SL.repeat_interleave(groups, dim=1), value_SL.repeat_interleave(groups, dim=1)
            # right-padded causal attention needs no mask: a real token never sees the pads behind it
            out = scaled_dot_product_attention(
                query_SL, key_SL, value_SL, attn_mask=mask, is_causal=mask is None, scale=scaling)
        return out.transpose(1, 2).flatten(0, 1)[where.repack_T][None]


def _gather(x: Tensor, index_SL: Tensor) -> Tensor:
    """[1, heads, T, head] -> [S, heads, L, head]"""
    return x[0].transpose(0, 1)[index_SL].transpose(1, 2)


@dataclass(slots=True)
class Decode:
    """One new token a row at `position_B`, against the row's own `position_B` earlier ones.

    `limit` is how many cache places are read: the longest row on a CPU, where less is faster; the whole room where shapes
    must not change (graphs). `visible_BL` masks the places a row has not written.
    """

    cache: KVCache
    position_B: Tensor
    row_B: Tensor
    visible_BL: Tensor
    limit: int

    @classmethod
    def at(cls, cache: KVCache, position_B: Tensor, limit: int) -> Decode:
        place_L = torch.arange(limit, device=position_B.device)
        row_B = torch.arange(position_B.shape[0], device=position_B.device)
        return cls(cache, position_B, row_B, place_L[None] <= position_B[:, None], limit)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.cache.keys[module.layer_idx], self.cache.values[module.layer_idx]
        keys[self.row_B, :, self.position_B] = key[:, :, 0]
        values[self.row_B, :, self.position_B] = value[:, :, 0]
        B, H, _, head = query.shape
        # the query heads that share a key head become rows of one small matrix: no repeated keys, longer inner loops
        grouped = query.reshape(B, keys.shape[1], -1, head)
        mask = self.visible_BL[:, None, None].expand(-1, 1, grouped.shape[2], -1)
        out = scaled_dot_product_attention(
            grouped, keys[:, :, : self.limit], values[:, :, : self.limit], attn_mask=mask, scale=scaling)
        return out.reshape(B, 1, H, head)


def _attention(module, query, key, value, attention_mask, scaling, layout: Packed | Decode, **_):
    return layout.attend(module, query, key, value, scaling), None


# no mask function is registered beside it, so transformers builds no mask tensor
AttentionInterface.register(NAME, _attention)


def check(model: PreTrainedModel, where: str) -> None:
    """UserError unless `model`'s attention can be routed through this file."""
    config = model.config
    kinds = getattr(config, "layer_types", None) or (["sliding_window"] if getattr(config, "sliding_window", None) else [])
    other = [kind for kind in kinds if kind != "full_attention"]
    if not getattr(model, "_supports_attention_backend", False) or other:
        reason = f"it has {other[0]} layers" if other else "its attention cannot be replaced"
        raise UserError(f"{where}: {type(model).__name__} is not supported: {reason}; wanted full causal attention")


def use(model: PreTrainedModel, where: str) -> None:
    """Route `model`'s attention through this file; UserError where its architecture cannot be routed."""
    check(model, where)
    model.config._attn_implementation = NAME
