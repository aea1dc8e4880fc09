"""From a llama GGUF file to a plain Hugging Face folder in bfloat16: weights, config, tokenizer, chat template.

The weights are bit for bit what transformers makes of the same file, without its GGUF path: that one leaves a
quantization config behind which `save_pretrained` refuses, and (checked with 5.19) a tokenizer that forgets to split
digits off a run of spaces. One deviation is wanted: the chat template written here adds no system prompt of its own,
so that a prompt holds what the recipe says and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, with a system turn only where one is given."""

TENSORS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
"""GGUF tensor names, the block prefix taken off, by their Hugging Face names."""

CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL: never produced from text by merging


def convert(gguf_path: Path, folder: Path) -> None:
    """Write `model.safetensors`, `config.json`, `generation_config.json` and the tokenizer's files into `folder`.

    The file must be of architecture `llama` with a tied head and a byte-level BPE of pre-tokenizer `smollm`. The same
    file gives the same bytes on every machine.
    """
    reader = gguf.GGUFReader(gguf_path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    kind = (metadata["general.architecture"], metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("llama", "gpt2", "smollm") or any(tensor.name == "output.weight" for tensor in reader.tensors):
        raise ValueError(f"{gguf_path}: expected a tied llama with a smollm tokenizer, got {kind}")
    save_file(_weights(reader, metadata), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(metadata))
    ends = {key: metadata[f"tokenizer.ggml.{name}_token_id"]
            for key, name in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")]}
    _write_json(folder / "generation_config.json", ends)
    _tokenizer(metadata).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _weights(reader: gguf.GGUFReader, metadata: dict) -> dict[str, Tensor]:
    num_heads = {"attn_q": metadata["llama.attention.head_count"], "attn_k": metadata["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        *block, part, _ = tensor.name.split(".")  # blk.7.attn_q.weight, or output_norm.weight
        weight = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if part in num_heads:
            weight = unpermute_rope(weight, num_heads[part])
        prefix = f"model.layers.{block[1]}." if block else ""
        # one tensor at a time: the float32 copy of a layer is gone before the next is read
        weights[f"{prefix}{TENSORS[part]}.weight"] = torch.tensor(weight, dtype=torch.bfloat16)
    return weights


def unpermute_rope(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows [heads * head, D] from GGUF's rotary order (pairs side by side) to Hugging Face's (two halves)."""
    rows, width = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _config(metadata: dict) -> dict:
    def llama(key: str):
        return metadata[f"llama.{key}"]

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": llama("vocab_size"),
        "hidden_size": llama("embedding_length"),
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": llama("block_count"),
        "num_attention_heads": llama("attention.head_count"),
        "num_key_value_heads": llama("attention.head_count_kv"),
        "head_dim": llama("rope.dimension_count"),
        "max_position_embeddings": llama("context_length"),
        "rope_theta": llama("rope.freq_base"),
        # the file holds float32(1e-5); seven digits give back the number that was meant
        "rms_norm_eps": float(f"{llama('attention.layer_norm_rms_epsilon'):.7g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer(metadata: dict) -> Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # llama.cpp's `smollm`: every digit by itself, then GPT-2's splitting
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([
        AddedToken(token, normalized=False, special=True)
        for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL_TOKEN])
    return tokenizer


def _tokenizer_config(metadata: dict) -> dict:
    def token(name: str) -> str:
        return metadata["tokenizer.ggml.tokens"][metadata[f"tokenizer.ggml.{name}_token_id"]]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
