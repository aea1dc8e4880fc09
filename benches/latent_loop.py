"""The loop that released latent methods decode with: a stock transformers model fed embeddings step by step, HRPO's mixture
by torch.

Whole batch, left-padded prompts, a growing cache, `torch.multinomial`, the mixture as p @ E, the gate of our method. At every
step all that was drawn is decoded to text, in which the delimiter is looked for; a row that has stopped is carried along until
the last one stops. Its noise and thus its tokens are its own, not ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from benches import setting
from benches.generate import left_padded, num_drawn
from fastlatent import build, models
from fastlatent.policy import EmbeddingInDtype, model_info
from fastlatent.schema import Config
from fastlatent.types import Request, Sampling


@dataclass(frozen=True, slots=True)
class Drawn:
    """What an update learns from; what a row drew behind its stop is in it, too."""

    token_ids_BC: Tensor  # int64
    latent_BC: Tensor  # bool, True where the input that reads the token is latent
    mixture_BCD: Tensor  # that of the distribution the token was drawn from


class LatentLoop:
    def __init__(self, config: Config, tokenizer):
        path, dtype = models.resolve_model(config.model.path), setting.dtype(config)
        self.model = models.load_causal_lm(path, dtype).to(build.device_of(config)).eval()
        table = EmbeddingInDtype(self.model.get_input_embeddings(), dtype)
        method = build.method_of(config)
        self.method = method(config.method, model_info(self.model, config.model, dtype), table).eval()
        self.sampling, self.tokenizer, self.end = build.sampling_of(config), tokenizer, config.thinking.end
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def drawing(self, requests: Sequence[Request], stop_ids: list[int], max_new: int | None = None) -> Callable[[int], int]:
        """A function that draws a row for each request, of at most `max_new` tokens (None: as the recipe says), and returns the
        number of tokens; its argument is the seed."""
        return lambda number: num_drawn(self.draw(requests, stop_ids, number, max_new).token_ids_BC, stop_ids)

    def draw(self, requests: Sequence[Request], stop_ids: list[int], seed: int, max_new: int | None = None) -> Drawn:
        # stacked out here: what inference mode makes could not be learnt from
        steps = self._steps(requests, stop_ids, seed, max_new)
        return Drawn(*(torch.stack(columns, dim=1) for columns in zip(*steps, strict=True)))

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies of all weights: the model's under their own names, the method's under `method.`."""
        own = dict(self.model.named_parameters()) | {f"method.{name}": p for name, p in self.method.named_parameters()}
        for name, parameter in own.items():
            parameter.copy_(tensors[name])

    @torch.inference_mode()
    def _steps(self, requests: Sequence[Request], stop_ids: list[int], seed: int,
               max_new: int | None) -> list[tuple[Tensor, ...]]:
        """Of every step the fields of Drawn, without the second dimension."""
        device = self.model.device
        torch.manual_seed(seed)
        input_ids_BP, mask_BP = (x.to(device) for x in left_padded([r.prompt.token_ids for r in requests], self.pad_id))
        thinking_B = torch.ones(len(requests), dtype=torch.bool, device=device)
        done_B = ~thinking_B
        cache, mask_BL, steps = DynamicCache(), mask_BP, []
        input_BLD = self.method.embed(input_ids_BP.flatten(), mask_BP.flatten() < 0, None).unflatten(0, input_ids_BP.shape)
        position_BL = (mask_BP.cumsum(1) - 1).clamp(min=0)
        for _ in range(max_new or self.sampling.max_new_tokens):
            out = self.model(inputs_embeds=input_BLD, attention_mask=mask_BL, position_ids=position_BL, past_key_values=cache,
                             use_cache=True, logits_to_keep=1)
            token_B, mixture_BD = mix(out.logits[:, -1], self.model.get_input_embeddings().weight, self.sampling)
            thinking_B = thinking_B & self._is_unended([*(step[0] for step in steps), token_B])
            steps.append((token_B, thinking_B, mixture_BD))
            done_B = done_B | torch.isin(token_B, torch.tensor(stop_ids, dtype=torch.int64, device=device))
            if done_B.all():
                break
            input_BLD = self.method.embed(token_B, thinking_B, {"mixture": mixture_BD})[:, None].to(self.model.dtype)
            mask_BL = torch.cat([mask_BL, torch.ones_like(mask_BL[:, :1])], dim=1)
            position_BL = position_BL[:, -1:] + 1
        return steps

    def _is_unended(self, drawn: list[Tensor]) -> Tensor:
        """Whether the text of each row [B], decoded anew, is without the delimiter."""
        texts = self.tokenizer.batch_decode(torch.stack(drawn, dim=1).tolist())
        return torch.tensor([self.end not in text for text in texts], device=self.model.device)


def mix(logits_BV: Tensor, table_VD: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """A token [B] drawn from softmax(logits / T), truncated to the top k where that is asked for, and
    p @ E / ||p||_2 [B, D]."""
    scaled_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k:
        kept_B1 = scaled_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < kept_B1, -torch.inf)
    p_BV = scaled_BV.softmax(dim=-1)
    mixture_BD = (p_BV / p_BV.norm(dim=-1, keepdim=True)).to(table_VD.dtype) @ table_VD
    return torch.multinomial(p_BV, 1)[:, 0], mixture_BD
