"""The loop that released latent methods decode with: a stock transformers model fed embeddings step by step, HRPO's mixture by torch.

Whole batch, left-padded prompts, a growing cache, `torch.multinomial`, the mixture as p @ E, the gate of our method; a row that
has stopped is carried along until the last one stops. Its noise and thus its tokens are its own, not ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from benches import setting
from benches.generate import left_padded, num_drawn
from fastlatent import build, models
from fastlatent.methods.base import METHODS
from fastlatent.policy import EmbeddingInDtype, model_info
from fastlatent.schema import Config
from fastlatent.types import Request, Sampling


class LatentLoop:
    def __init__(self, config: Config, tokenizer):
        path, dtype = models.resolve_model(config.model.path), setting.dtype(config)
        self.model = models.load_causal_lm(path, dtype).to(build.device_of(config)).eval()
        table = EmbeddingInDtype(self.model.get_input_embeddings(), dtype)
        self.method = METHODS.find(config.method.name, "")(config.method, model_info(self.model, config.model, dtype), table).eval()
        self.sampling = build.sampling_of(config)
        self.end_id = tokenizer.encode(config.thinking.end, add_special_tokens=False)[-1]
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def drawing(self, requests: Sequence[Request], stop_ids: list[int], max_new: int | None = None) -> Callable[[int], int]:
        """A function that draws a row for each request, of at most `max_new` tokens (None: as the recipe says), and returns the
        number of tokens; its argument is the seed."""
        input_ids_BP, mask_BP = left_padded([r.prompt.token_ids for r in requests], self.pad_id)
        input_ids_BP, mask_BP = input_ids_BP.to(self.model.device), mask_BP.to(self.model.device)

        @torch.inference_mode()
        def draw(number: int) -> int:
            torch.manual_seed(number)
            B = len(requests)
            plain_B = torch.zeros(B, dtype=torch.bool, device=self.model.device)
            thinking_B, done_B = ~plain_B, plain_B.clone()
            cache, mask_BL, drawn = DynamicCache(), mask_BP, []
            input_BLD = self.method.embed(input_ids_BP.flatten(), mask_BP.flatten() < 0, None).unflatten(0, input_ids_BP.shape)
            position_BL = (mask_BP.cumsum(1) - 1).clamp(min=0)
            for _ in range(max_new or self.sampling.max_new_tokens):
                out = self.model(inputs_embeds=input_BLD, attention_mask=mask_BL, position_ids=position_BL, past_key_values=cache,
                                 use_cache=True, logits_to_keep=1)
                token_B, mixture_BD = mix(out.logits[:, -1], self.model.get_input_embeddings().weight, self.sampling)
                drawn.append(token_B)
                thinking_B = thinking_B & (token_B != self.end_id)
                done_B = done_B | torch.isin(token_B, torch.tensor(stop_ids, dtype=torch.int64, device=token_B.device))
                if done_B.all():
                    break
                input_BLD = self.method.embed(token_B, thinking_B, {"mixture": mixture_BD})[:, None].to(self.model.dtype)
                mask_BL = torch.cat([mask_BL, torch.ones_like(mask_BL[:, :1])], dim=1)
                position_BL = position_BL[:, -1:] + 1
            return num_drawn(torch.stack(drawn, dim=1), stop_ids)

        return draw


def mix(logits_BV: Tensor, table_VD: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """A token [B] drawn from softmax(logits / T), truncated to the top k where that is asked for, and p @ E / ||p||_2 [B, D]."""
    scaled_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k:
        kept_B1 = scaled_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < kept_B1, -torch.inf)
    p_BV = scaled_BV.softmax(dim=-1)
    mixture_BD = (p_BV / p_BV.norm(dim=-1, keepdim=True)).to(table_VD.dtype) @ table_VD
    return torch.multinomial(p_BV, 1)[:, 0], mixture_BD
