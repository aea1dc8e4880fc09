"""vocab_head in bfloat16 on a CPU with AVX512_BF16: one stream over the vocabulary, logits and mixture of a tile together.

The logits are float32 sums that are never rounded to bfloat16, and a row gives the same bits whatever it is batched with
and on however many threads.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

import fastlatent_kernels._C as _C
from fastlatent_kernels.library import LIBRARY
from fastlatent_kernels.native import empty_rows
from fastlatent_kernels.structs import fill
from fastlatent_kernels.vocab_head import VocabHead

HAS_KERNEL = _C.has_vocab_head_bf16()
"""Whether this processor has the instructions, and none that a library multiplies faster with."""

LIBRARY.define("head_logits_bf16(Tensor hidden, Tensor weight) -> Tensor")
LIBRARY.define("vocab_head_bf16(Tensor hidden, Tensor weight, float temperature, Tensor seed, Tensor counter, "
               "bool greedy, Tensor? embed) -> (Tensor, Tensor, Tensor, Tensor)")


def takes(hidden_BD: Tensor, weight_VD: Tensor, embed_VD: Tensor | None) -> bool:
    """Whether this processor, and what is asked of it, suit the kernel."""
    tables = [weight_VD] if embed_VD is None else [weight_VD, embed_VD]
    return (HAS_KERNEL and hidden_BD.dtype == torch.bfloat16
            and all(t.dtype == torch.bfloat16 and not t.is_mkldnn and t.is_contiguous() for t in tables))


class _Scratch(threading.local):
    """Memory that a thread keeps from call to call: fresh pages of the system would take up to a tenth of a call."""

    MOST_KEPT = 2**22  # floats, 16 MiB of each name

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, size: int) -> Tensor:
        """At least `size` floats of anything."""
        if name in self.kept and self.kept[name].numel() >= size:
            return self.kept[name]
        taken = torch.empty(size, dtype=torch.float32, device="cpu")
        if size <= self.MOST_KEPT:
            self.kept[name] = taken
        return taken


_SCRATCH = _Scratch()


def logits(hidden_BD: Tensor, weight_VD: Tensor) -> Tensor:
    """hidden @ weight.T in float32, [B, V], of the sums that `run` draws from."""
    return torch.ops.fastlatent.head_logits_bf16(hidden_BD, weight_VD)


def run(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD) -> VocabHead:
    *row_numbers, mixture_BD = torch.ops.fastlatent.vocab_head_bf16(
        hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD)
    return VocabHead(*row_numbers, None if embed_VD is None else mixture_BD)


def _run(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD):
    """token, logprob, entropy and the mixture, [B, 0] where no embed was given."""
    token_B, logprob_B, entropy_B, mixture_BD = out = _empty_outputs(hidden_BD, embed_VD)
    hidden_BD, counter_B3 = hidden_BD.contiguous(), counter_B3.contiguous()
    (num_rows, width), vocab_size, embed_width = hidden_BD.shape, weight_VD.shape[0], mixture_BD.shape[1]
    num_splits = _C.VocabHeadBf16.splits(vocab_size)
    scratch = {"sums": num_rows * 4 * num_splits, "draws": num_splits * num_rows * _C.VocabHeadBf16.draw_floats(),
               "part": num_splits * num_rows * (-(-embed_width // 32) * 32), "hidden_quads": _quads_size(num_rows, width)}
    fields = {name: _SCRATCH.take(name, size) for name, size in scratch.items()}
    fields |= {"hidden": hidden_BD, "weight": weight_VD, "seed": seed, "counter": counter_B3, "greedy": greedy,
               "rows": num_rows, "vocab": vocab_size, "width": width, "embed_width": embed_width,
               "inv_temperature": 1.0 / temperature, "token": token_B, "logprob": logprob_B, "entropy": entropy_B,
               "embed": embed_VD, "mixture": mixture_BD, "threads": torch.get_num_threads()}
    _call(_C.vocab_head_bf16, fields)
    return out


def _run_logits(hidden_BD: Tensor, weight_VD: Tensor) -> Tensor:
    logits_BV, hidden_BD = _empty_logits(hidden_BD, weight_VD), hidden_BD.contiguous()
    (num_rows, width), vocab_size = hidden_BD.shape, weight_VD.shape[0]
    _call(_C.head_logits_bf16, {
        "hidden": hidden_BD, "weight": weight_VD, "rows": num_rows, "vocab": vocab_size, "width": width, "logits": logits_BV,
        "hidden_quads": _SCRATCH.take("hidden_quads", _quads_size(num_rows, width)), "threads": torch.get_num_threads()})
    return logits_BV


def _empty_logits(hidden_BD: Tensor, weight_VD: Tensor) -> Tensor:
    return hidden_BD.new_empty(hidden_BD.shape[0], weight_VD.shape[0], dtype=torch.float32)


def _quads_size(num_rows: int, width: int) -> int:
    """Floats: rows by fours, eight bfloat16 numbers of each side by side."""
    return _C.VocabHeadBf16.quads(num_rows) * -(-width // 8) * 16


def _call(kernel, fields: dict[str, object]) -> None:
    arguments = _C.VocabHeadBf16()
    fill(arguments, fields)
    kernel(arguments)


def _empty_outputs(hidden_BD: Tensor, embed_VD: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    embed_width = 0 if embed_VD is None else embed_VD.shape[1]
    return *empty_rows(hidden_BD), hidden_BD.new_empty(hidden_BD.shape[0], embed_width)


if HAS_KERNEL:
    LIBRARY.impl("vocab_head_bf16", _run, "CPU")
    LIBRARY.impl("head_logits_bf16", _run_logits, "CPU")


@torch.library.register_fake("fastlatent::vocab_head_bf16", lib=LIBRARY)
def _fake_run(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD):
    return _empty_outputs(hidden_BD, embed_VD)


@torch.library.register_fake("fastlatent::head_logits_bf16", lib=LIBRARY)
def _fake_run_logits(hidden_BD, weight_VD):
    return _empty_logits(hidden_BD, weight_VD)
