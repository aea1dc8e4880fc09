"""From an example to the prompt's text and tokens: system prompt, chat template, suffix.

What a template does where no system prompt is given is the model's own business (Qwen2.5's writes one of its own); the
quickstart model comes with a template that adds nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jinja2 import TemplateError

from fastlatent.data.base import Example
from fastlatent.errors import UserError
from fastlatent.schema import ChatConfig
from fastlatent.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_prompt(tokenizer: PreTrainedTokenizerBase, example: Example, chat: ChatConfig) -> Prompt:
    """The example as the model reads it; UserError as from `encode_prompt`."""
    text, token_ids = encode_prompt(tokenizer, example, chat)
    return Prompt(example.id, text, tuple(token_ids), example.answer, example.columns)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, example: Example, chat: ChatConfig) -> tuple[str, list[int]]:
    """The text the model reads and its token ids.

    With `chat.template` the text ends where the assistant's turn begins, and the template alone decides about special
    tokens; without, it is the bare question, and the tokenizer adds those it adds to any text. UserError where the
    prompt is longer than `chat.max_prompt_tokens` or the template cannot be used.
    """
    question = example.question + chat.suffix
    if not chat.template:
        if chat.system is not None:
            raise UserError("chat.system: a system prompt needs chat.template=true")
        text, token_ids = question, tokenizer.encode(question)
    else:
        text = _render(tokenizer, question, chat.system)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
    if len(token_ids) > chat.max_prompt_tokens:
        raise UserError(f"{example.source or f'example {example.id}'}: the prompt has {len(token_ids)} tokens, "
                        f"more than chat.max_prompt_tokens={chat.max_prompt_tokens}")
    return text, token_ids


def _render(tokenizer: PreTrainedTokenizerBase, question: str, system: str | None) -> str:
    if not tokenizer.chat_template:
        raise UserError(f"chat.template: {tokenizer.name_or_path} has no chat template; set chat.template=false")
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": question})
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:  # raised by templates that know no system role
        reason = f"the template of {tokenizer.name_or_path} refuses this prompt: {error}"
        raise UserError(f"chat.template: {reason}") from None
