"""Where thinking ends and where a completion stops: tables over the vocabulary, stepped on the device for every method.

Thinking ends when the completion's text contains `thinking.end`. A token's bytes move a matcher (Knuth-Morris-Pratt over
bytes) by one table look-up, so nothing is decoded in the loop. With a thinking budget the end can also be forced: the forced
text is read token by token, each a plain input and no action; a drawn EOS or stop token that ends thinking stays the action,
while the first forced token is read in its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fastlatent.schema import AnswerConfig, ThinkingConfig

THINKING, FORCING, ANSWERING = 0, 1, 2
UNBOUNDED = 2**31 - 1


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[bytes]:
    """The bytes each token adds to the text; b"" for special tokens and for ids the tokenizer does not have.

    Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) spells bytes as printable characters; SentencePiece spells a space as U+2581
    and other bytes as <0x0A>.
    """
    backend = tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, "backend_tokenizer", None) else ""
    is_byte_level = '"ByteLevel"' in backend
    decode = {char: byte for byte, char in bytes_to_unicode().items()}
    added = tokenizer.added_tokens_decoder
    out = [b""] * vocab_size
    for text, index in tokenizer.get_vocab().items():
        if index >= vocab_size:
            continue
        if index in added:
            out[index] = b"" if added[index].special else added[index].content.encode()
        elif is_byte_level:
            out[index] = bytes(decode[char] for char in text)
        elif text.startswith("<0x") and text.endswith(">") and len(text) == 6:
            out[index] = bytes([int(text[3:5], 16)])
        else:
            out[index] = text.replace("\u2581", " ").encode()
    return out


def matcher_table(pattern: bytes, tokens: list[bytes]) -> np.ndarray:
    """[V, M + 1] uint8: the matcher's state after reading token v in state s; state M (pattern seen) is never left."""
    M = len(pattern)
    step = np.zeros((M + 1, 256), np.uint8)  # one byte at a time
    fallback = 0
    for state in range(M):
        step[state] = step[fallback]
        step[state, pattern[state]] = state + 1
        if state:
            fallback = step[fallback, pattern[state]]
    step[M] = M
    length = np.array([len(token) for token in tokens])
    padded = np.zeros((len(tokens), max(length.max(initial=0), 1)), np.uint8)
    for index, token in enumerate(tokens):
        padded[index, : len(token)] = np.frombuffer(token, np.uint8)
    table = np.tile(np.arange(M + 1, dtype=np.uint8), (len(tokens), 1))
    for column in range(padded.shape[1]):
        live = length > column
        table[live] = step[table[live], padded[live, column, None]]
    return table


@dataclass(slots=True)
class Advance:
    """What one drawn token led to, per row."""

    read_B: Tensor  # the token the model reads next
    acted_B: Tensor  # bool, False where it was forced
    thinking_B: Tensor  # bool, True where it is read while still thinking
    drawn_thinking_B: Tensor  # bool, True where it was drawn while thinking


class ThinkingSpan:
    """The automaton of one (tokenizer, configuration); `start` makes its per-row state, `advance` steps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: list[int], thinking: ThinkingConfig,
                 answer: AnswerConfig, device: torch.device | str = "cpu"):
        self.end = thinking.end
        tokens = token_bytes(tokenizer, vocab_size)
        specials = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        if thinking.end in specials:
            tokens[specials[thinking.end]] = thinking.end.encode()  # an end string that is a special token is visible
        pattern = thinking.end.encode()
        force = thinking.force if thinking.force is not None else thinking.end
        forced_ids = tokenizer.encode(force, add_special_tokens=False)
        self.matched = len(pattern)
        self.table_VM = torch.from_numpy(matcher_table(pattern, tokens)).to(device)
        self.forced_F = torch.tensor(forced_ids or [0], device=device)
        self.is_eos_V = torch.zeros(vocab_size, dtype=torch.bool)
        self.is_eos_V[eos_ids] = True
        self.is_end_V = _contains(tokens, [thinking.end]).to(device)
        self.ends_thinking_V = (_contains(tokens, thinking.stop) | self.is_eos_V).to(device)
        self.ends_answer_V = (_contains(tokens, answer.stop) | self.is_eos_V).to(device)
        self.is_eos_V = self.is_eos_V.to(device)
        self.is_forcing = thinking.max_tokens is not None
        self.max_thinking = thinking.max_tokens if self.is_forcing else UNBOUNDED
        self.max_answer = answer.max_tokens if answer.max_tokens is not None else UNBOUNDED

    def longest(self, max_new_tokens: int) -> int:
        """Most tokens a completion can have."""
        if not self.is_forcing or self.max_answer == UNBOUNDED:
            return max_new_tokens
        return min(max_new_tokens, self.max_thinking + len(self.forced_F) + self.max_answer)

    def start(self, num_rows: int, device: torch.device) -> dict[str, Tensor]:
        zeros = torch.zeros(num_rows, dtype=torch.int64, device=device)
        names = ("phase", "match", "num_forced", "num_thinking", "num_answer")
        state = {name: zeros.clone() for name in names}
        state |= {name: zeros.bool() for name in ("done", "stopped", "forced_end")}
        return state

    def is_thinking(self, state: dict[str, Tensor]) -> Tensor:
        """Rows whose next token is drawn while thinking, bool [B]."""
        return state["phase"] == THINKING

    def advance(self, token_B: Tensor, state: dict[str, Tensor]) -> Advance:
        """Step every row by its drawn token; changes `state` in place. Rows that are done stay done."""
        phase_B = state["phase"]
        thinking_B, forcing_B = phase_B == THINKING, phase_B == FORCING

        # forced text replaces the draw; a draw that ends thinking early is replaced by the text's first token, unless it
        # holds the end string itself
        wrote_end_B = self.table_VM[token_B, state["match"]] == self.matched
        early_B = thinking_B & ~wrote_end_B & (self.ends_thinking_V[token_B] if self.is_forcing else False)
        place_B = torch.where(early_B, 0, state["num_forced"]).clamp(max=self.forced_F.shape[0] - 1)
        from_text_B = forcing_B | early_B
        read_B = torch.where(from_text_B, self.forced_F[place_B], token_B)
        state["num_forced"] += from_text_B
        state["forced_end"] |= from_text_B

        match_B = self.table_VM[read_B, state["match"]].long()
        state["match"].copy_(match_B)
        # the forced text counts as the end even while it is being written
        completes_B = thinking_B & ~early_B & (match_B == self.matched)
        still_B = thinking_B & ~early_B & ~completes_B
        state["num_thinking"] += still_B
        over_B = still_B & (state["num_thinking"] >= self.max_thinking)
        written_B = from_text_B & (state["num_forced"] >= self.forced_F.shape[0])
        answering_B = phase_B == ANSWERING
        state["num_answer"] += answering_B

        next_B = torch.where(completes_B | written_B | answering_B, ANSWERING, phase_B)
        next_B = torch.where((early_B | over_B) & ~written_B, FORCING, next_B)
        state["phase"].copy_(next_B)

        # without a budget an EOS while thinking stops the completion, as it does everywhere else
        stops_B = (answering_B & self.ends_answer_V[token_B])
        if not self.is_forcing:
            stops_B = stops_B | (thinking_B & self.is_eos_V[token_B])
        state["stopped"] |= stops_B & ~state["done"]
        state["done"] |= stops_B | (answering_B & (state["num_answer"] >= self.max_answer))
        return Advance(read_B, ~forcing_B, still_B, thinking_B)


def eos_ids(tokenizer: PreTrainedTokenizerBase, generation_config=None) -> list[int]:
    """Every id that ends a completion: the generation config's (Llama 3 has three), else the tokenizer's."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured, tokenizer.eos_token_id]
    return sorted({index for index in ids if index is not None})


def _contains(tokens: list[bytes], needles: list[str]) -> Tensor:
    wanted = [needle.encode() for needle in needles]
    return torch.tensor([any(needle in token for needle in wanted) for token in tokens])
