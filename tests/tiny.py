"""Two-layer random models and a byte-level tokenizer, made on the spot: everything the trainer does, in milliseconds."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config,
    Qwen3ForCausalLM)

from fastlatent.methods.base import METHODS
from fastlatent.policy import Policy
from fastlatent.rollout.base import EngineParts
from fastlatent.rollout.hf_engine import HFEngine
from fastlatent.rollout.thinking import ThinkingSpan, eos_ids
from fastlatent.schema import AnswerConfig, ModelConfig, ThinkingConfig
from fastlatent.types import Prompt, Request

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
TEXT = ["Tom has 12 apples and buys 30 more.", "How many apples does Tom have now? #### 42\n", "5 + 7 = 12 #### 12\n\n"]
TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, a few merges (some hold '#'), and special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                                  special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"])
    backend.train_from_iterator(TEXT * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


def model(family: str = "qwen2", *, is_tied: bool = False, seed: int = 0, scale: float = 4.0, num_heads: int = 4):
    """Float32, sharp enough (weights times `scale`) that a wrong input shows in the log-probabilities."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=len(tokenizer()), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2, head_dim=64 // num_heads, max_position_embeddings=2048, tie_word_embeddings=is_tied,
        eos_token_id=tokenizer().eos_token_id, pad_token_id=tokenizer().pad_token_id, bos_token_id=None)
    out = model_class(config)
    with torch.no_grad():
        for name, parameter in out.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return out.eval()


def save(folder: Path, family: str = "qwen2", **options) -> Path:
    """A Hugging Face folder of `model` and `tokenizer`."""
    model(family, **options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def working_folder(folder: Path, num_rows: int = 16) -> Path:
    """Somewhere to train: `model`, so many questions in `rows.jsonl`, and a reward of the user's own, `checksum.checksum`."""
    save(folder / "model")
    rows = [{"question": f"Tom has {n} apples and buys 30 more.", "answer": str(n + 30)} for n in range(num_rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "checksum.py").write_text("def checksum(completion):\n    return float(sum(map(ord, completion)) % 5)\n")
    return folder


def prompts(lengths: list[int], first_id: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randint(4, len(tokenizer()), (n,), generator=generator).tolist() for n in lengths]
    return [Prompt(first_id + i, f"prompt {i}", tuple(token_ids), "1") for i, token_ids in enumerate(drawn)]


def requests(prompts_: list[Prompt], group_size: int, step: int = 0) -> list[Request]:
    return [Request(p, step, g) for p in prompts_ for g in range(group_size)]


def policy(method: str, *, family: str = "qwen2", dtype: str = "float32", is_tied: bool = False, strong: bool = True,
           has_reference: bool = False, num_heads: int = 4, **model_options) -> Policy:
    """A policy whose method's parameters are drawn from seed 0; `strong` gives HRPO a gate of about 0.9."""
    base = model(family, is_tied=is_tied, num_heads=num_heads)
    torch.manual_seed(0)
    member = METHODS.find(method, "method.name")
    out = Policy(base, ModelConfig(path="tiny", dtype=dtype, **model_options), member, member.Config(),
                 has_reference=has_reference)
    if strong and method == "hrpo":
        with torch.no_grad():  # u^(1/2) in 0.85 .. 0.95
            u_D = torch.empty(64).uniform_(0.85**2, 0.95**2)
            out.method.gate_lambda.copy_(-torch.log(u_D.pow(-1 / 8) - 1))
            out.method.gate_weight.normal_(std=0.05)
    return out


def parts(policy_: Policy, thinking: ThinkingConfig, answer: AnswerConfig, *, seed: int = 7, max_new: int = 32,
          max_prompt: int = 256, has_eos: bool = True) -> EngineParts:
    """What any engine for this policy is made from."""
    info = policy_.method.model
    span = ThinkingSpan(tokenizer(), info.vocab_size, eos_ids(tokenizer()) if has_eos else [], thinking, answer, policy_.device)
    return EngineParts(model=policy_.base.config, dtype=policy_.dtype, device=policy_.device,
                       method=functools.partial(type(policy_.method), policy_.method.config, info), span=span, seed=seed,
                       max_prompt_tokens=max_prompt, max_new_tokens=max_new)


def engine(policy_: Policy, thinking: ThinkingConfig, answer: AnswerConfig, *, seed: int = 7, **options) -> HFEngine:
    """An engine of its own for a policy, with its weights loaded as version 0."""
    out = HFEngine.build(HFEngine.Config(**options), parts(policy_, thinking, answer, seed=seed))
    out.load_weights(policy_.published(), 0)
    return out
