"""transformers' own `generate` on the recipe's prompts, counting what it draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig

from benches import setting
from fastlatent import build, models
from fastlatent.schema import Config
from fastlatent.types import Request


class Generate:
    """A stock model in the recipe's compute dtype, left-padded prompts, the recipe's temperature and truncation."""

    def __init__(self, config: Config, tokenizer):
        path = models.resolve_model(config.model.path)
        self.model = models.load_causal_lm(path, setting.dtype(config)).to(build.device_of(config)).eval()
        self.sampling = build.sampling_of(config)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def drawing(self, requests: Sequence[Request], stop_ids: list[int], max_new: int | None = None) -> Callable[[int], int]:
        """A function that draws a row for each request, of at most `max_new` tokens (None: as the recipe says), and returns the
        number of tokens; its argument is the seed."""
        input_ids_BP, mask_BP = left_padded([r.prompt.token_ids for r in requests], self.pad_id)
        input_ids_BP, mask_BP = input_ids_BP.to(self.model.device), mask_BP.to(self.model.device)
        s = self.sampling
        generation_config = GenerationConfig(
            do_sample=True, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p,
            max_new_tokens=max_new or s.max_new_tokens, eos_token_id=stop_ids or None, pad_token_id=self.pad_id)

        def draw(number: int) -> int:
            # set on the model: generate fills what is None in an argument from there, and None means no EOS here
            self.model.generation_config = generation_config
            torch.manual_seed(number)
            out_BL = self.model.generate(input_ids=input_ids_BP, attention_mask=mask_BP)
            return num_drawn(out_BL[:, input_ids_BP.shape[1]:], stop_ids)

        return draw


def num_drawn(token_ids_BL: Tensor, stop_ids: list[int]) -> int:
    """Tokens up to and with the first stop of each row."""
    is_stop_BL = torch.isin(token_ids_BL, torch.tensor(stop_ids, dtype=torch.int64, device=token_ids_BL.device))
    num_before_BL = is_stop_BL.cumsum(1) - is_stop_BL.long()
    return int((num_before_BL == 0).sum())


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, longest]."""
    longest = max(map(len, rows))
    token_ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(token_ids), torch.tensor(mask)
