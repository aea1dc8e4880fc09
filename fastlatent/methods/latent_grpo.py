"""Latent-GRPO (arXiv:2604.27998): while it thinks, the model's next input is a mixture of tokens drawn with Gumbel noise, and
the mixture is the action: its log-density takes the place of a token's log-probability in the ratio.

    draw     score_k = log p(id_k) + noise_k for the k best of the likely tokens          gumbel_mixture.py
    read     input = sum_k softmax(score / tau)_k E[id_k]
    density  mean_k(-d_k - exp(-d_k)), d_k = score_k - log p(id_k) under the weights that learn
    learn    three changes to GRPO: cut completions are masked, slopes are bounded where d < 0 and the advantage is not
             positive, and of a group's right first mixtures one alone is reinforced

The completion's token at a latent position is the one of the largest score. Where it, or the likeliest token, ends thinking, it
is read as itself, and is an action with its log-probability at the sampling temperature, as every token after it.

Deviations from the released code: any token whose text completes `thinking.end` ends thinking, not one hard-coded id; the
rollout keeps the scores and the ids of one draw (theirs can come from two); the first-token rule takes the log-probabilities
the rollout was drawn with, which a second pass gives again, and passes over a completion that is masked (theirs, where cut
completions are masked, can choose one, whose group then has no first mixture).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from fastlatent_kernels import soft_embedding, token_logprob
from fastlatent_kernels.topk_gumbel.density import mixture_weights
from torch import Tensor

from fastlatent import advantages, objectives, schema
from fastlatent.errors import UserError
from fastlatent.methods import gumbel_mixture
from fastlatent.methods.base import METHODS, Decision, Method, Record, RecordSpec, State, StepView
from fastlatent.methods.gumbel_mixture import MixtureConfig
from fastlatent.profiling import span
from fastlatent.schema import ObjectiveConfig
from fastlatent.types import Batch, Capability, Group, Loss, Sampling, Scored

END_RULES = ("likeliest", "contest")
TRUNCATED = ("excluded", "masked", "kept")


@METHODS.register("latent_grpo")
class LatentGRPO(Method):
    needs = frozenset({Capability.LOGITS})

    @dataclass(kw_only=True)
    class Config(MixtureConfig):
        name: str = "latent_grpo"
        end_rule: str = "likeliest"
        """likeliest: thinking ends where the likeliest token ends it, whatever the noise (the released code on Llama).
        contest: only where the end also wins the noisy draw (the released code on Qwen)."""
        truncated: str = "masked"
        """What a completion cut by its length limit does, which is never learnt from unless kept. masked: it counts in its
        group's mean and deviation (published for easy problems). excluded: it does not (for hard ones). kept: plain GRPO."""
        bound_negative: bool = True
        """Where the advantage is not positive, bound the slope of scores that the policy has moved past (d < 0)."""
        select_first: bool = True
        """Of a group's completions with a positive advantage, the likeliest per token alone is learnt from at its first
        position; all others of the group have advantage 0 there."""
        is_latent_init: bool = False
        """The model has learnt to read mixtures (latent SFT). Without it you are warned, but for one that fastlatent.export
        wrote of such a run."""

        def __post_init__(self):
            MixtureConfig.__post_init__(self)
            for name, known in (("end_rule", END_RULES), ("truncated", TRUNCATED)):
                if (value := getattr(self, name)) not in known:
                    raise UserError(f"method.{name}: {value!r} is not one of {', '.join(known)}")

    needs_latent_init = True

    @classmethod
    def check(cls, config: schema.Config, tokenizer) -> list[str]:
        end, own = config.thinking.end, config.method
        tokens = tokenizer.encode(end, add_special_tokens=False)
        if len(tokens) != 1:
            pieces = [tokenizer.decode([index]) for index in tokens]
            raise UserError(
                f"thinking.end: {own.name} ends its latents with one token, and {end!r} is {len(tokens)} here: "
                f"{', '.join(map(repr, pieces))}; thinking.end={pieces[0]!r} would do")
        if own.top_k > len(tokenizer):
            raise UserError(f"method.top_k: a mixture of {own.top_k} tokens is more than the vocabulary's {len(tokenizer)}")
        warnings = []
        if own.noise_scale != 1:
            warnings.append(f"method.noise_scale={own.noise_scale}: the density that is learnt from takes the noise to be a "
                            "standard Gumbel's, so its ratios are biased; 1 is what it fits")
        if cls.needs_latent_init and not (own.is_latent_init or _is_exported(Path(config.model.path).expanduser())):
            warnings.append(f"model.path={config.model.path}: {own.name} starts from a model that already reasons in mixtures, "
                            "and one that does not will hardly learn; begin with python -m fastlatent.sft and export what it "
                            "makes, or say method.is_latent_init=true of another that does (its authors published "
                            "DJCheng/LLaMA3.2-1B-Instruct-Latent-SFT-Top10)")
        return warnings

    # ---- decoding ------------------------------------------------------------------------------------------------------

    def record_spec(self, width: int, sampling: Sampling) -> RecordSpec:
        return {"ids": ((self.config.top_k,), torch.int32), "score": ((self.config.top_k,), torch.float32)}

    def draw(self, view: StepView, state: State) -> None:
        """The mixture's best token for the head's, while thinking."""
        mixture = gumbel_mixture.draw(self.config, view.logits_BV, view.sampling.greedy, view.seed, view.counter_B3)
        token_B = mixture.best_B
        if self.config.end_rule == "likeliest":
            token_B = torch.where(view.is_end_V[mixture.likeliest_B], mixture.likeliest_B, token_B)
        # at the sampling temperature: two tokens of a row differ in log-probability as their logits do
        logit_B2 = view.logits_BV.gather(1, torch.stack([token_B, view.token_B], dim=1)).float()
        logprob_B = view.logprob_B + (logit_B2[:, 0] - logit_B2[:, 1]) / view.sampling.temperature
        view.token_B = torch.where(view.thinking_B, token_B, view.token_B)
        view.logprob_B = torch.where(view.thinking_B, logprob_B, view.logprob_B)
        view.log_kept_B = torch.where(view.thinking_B, 0.0, view.log_kept_B)
        view.drawn = {"ids": mixture.ids_BK, "score": mixture.score_BK, "logprob": mixture.logprob_BK}

    def decide(self, view: StepView, state: State) -> Decision:
        ids_BK, score_BK, logprob_BK = (view.drawn[name] for name in ("ids", "score", "logprob"))
        return Decision(latent_B=view.thinking_B, record={"ids": ids_BK.int(), "score": score_BK},
                        latent_logprob_B=gumbel_mixture.log_density(self.config, score_BK, logprob_BK))

    def embed(self, token_ids_T: Tensor, latent_T: Tensor, record_T: Record | None) -> Tensor:
        token_TD = self.embedding(token_ids_T)
        if record_T is None:
            return token_TD
        table_VD = self._embedding[0].weight.to(self.model.dtype)
        mixture_TD = soft_embedding(record_T["ids"].long(), self.weights(record_T), table_VD)
        return torch.where(latent_T[:, None], mixture_TD, token_TD)

    def weights(self, record_T: Record) -> Tensor:
        return mixture_weights(record_T["score"], self.config.mixture_temperature)

    # ---- imitation -----------------------------------------------------------------------------------------------------

    @classmethod
    def mixture_size(cls, config: LatentGRPO.Config) -> int:
        return config.top_k

    def mixture_record(self, ids_NK: Tensor, weights_NK: Tensor, seed: Tensor, counter_N3: Tensor, noise: bool) -> Record:
        score_NK = gumbel_mixture.scores_of(self.config, ids_NK, weights_NK, seed, counter_N3, noise)
        return {"ids": ids_NK.int(), "score": score_NK}

    # ---- learning ------------------------------------------------------------------------------------------------------

    def advantages(self, group: Group, objective: ObjectiveConfig) -> Tensor:
        how = self.config.truncated
        is_cut_G = torch.tensor([r.finish == "length" for r in group.rollouts])
        if how == "kept" or not is_cut_G.any():
            return advantages.of_group(group, objective)
        if how == "masked":
            return torch.where(is_cut_G, 0.0, advantages.of_group(group, objective))
        whole_G = torch.where(is_cut_G, math.nan, group.reward_G)
        if (~whole_G.isnan()).sum() == 1:  # its authors' rule: mean 0 and deviation 1
            return (whole_G.nan_to_num(0.0) / (1 + objective.advantage_eps)).float()
        return advantages.of_group(replace(group, reward_G=whole_G), objective)

    def action_advantages(self, group: Group) -> list[float | list[float]]:
        advantage = group.advantage_G.tolist()
        winner = self.first_winner(group)
        if winner is None:
            return advantage
        out = [[a] * sum(r.acted) for a, r in zip(advantage, group.rollouts, strict=True)]
        for index, row in enumerate(out):
            if index != winner:
                row[0] = 0.0
        return out

    def first_winner(self, group: Group) -> int | None:
        """The rollout whose first position is learnt from: positive advantage, largest mean log-probability."""
        if not self.config.select_first:
            return None
        candidates = [i for i, a in enumerate(group.advantage_G.tolist()) if a > 0]
        return max(candidates, key=lambda i: sum(group.rollouts[i].logprobs) / sum(group.rollouts[i].acted), default=None)

    def score(self, policy, batch: Batch, temperature: float) -> Scored:
        hidden_AD = policy.scored_hidden(batch)
        with span("update/head"):
            return self._score(hidden_AD, policy.head_weight, batch, temperature)

    def reference_logprob(self, policy, batch: Batch, temperature: float) -> Tensor:
        """The reference reads the same mixtures."""
        with torch.no_grad():
            hidden_AD = policy.reference_hidden(batch, self.embed(batch.token_ids_T, batch.latent_T, batch.record_T))
            return self._score(hidden_AD, policy.reference_head_weight, batch, temperature).logprob_A

    def _score(self, hidden_AD: Tensor, head_VD: Tensor, batch: Batch, temperature: float) -> Scored:
        """Tokens at `temperature`, mixtures at 1."""
        actions = batch.actions
        if actions is None:
            return Scored(*token_logprob(hidden_AD, head_VD, batch.target_A, temperature))
        latent_N, token_M, record_N = actions.latent_N, actions.token_M, actions.record_N
        logprob_NK, entropy_N = token_logprob(hidden_AD[latent_N], head_VD, record_N["ids"].long(), 1.0)
        bounded_N = batch.advantage_A[latent_N] <= 0 if self.config.bound_negative else None
        density_N = gumbel_mixture.log_density(self.config, record_N["score"], logprob_NK, bounded_N)
        logprob_A, entropy_A = (torch.zeros(len(batch.score_A), dtype=x.dtype, device=x.device).index_copy(0, latent_N, x)
                                for x in (density_N, entropy_N))
        if len(token_M):
            logprob_M, entropy_M = token_logprob(hidden_AD[token_M], head_VD, batch.target_A[token_M], temperature)
            logprob_A, entropy_A = logprob_A.index_copy(0, token_M, logprob_M), entropy_A.index_copy(0, token_M, entropy_M)
        return Scored(logprob_A, entropy_A, {
            "noise_NK": gumbel_mixture.noise_of(self.config, record_N["score"], logprob_NK.detach())})

    def loss(self, policy, batch: Batch, temperature: float, objective: ObjectiveConfig) -> Loss:
        scored = self.score(policy, batch, temperature)
        with span("update/head"):
            loss = objectives.surrogate(scored, batch, objective)
            loss.statistics = self._loss_statistics(scored, batch, objective)
        return loss

    # ---- the log -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _loss_statistics(self, scored: Scored, batch: Batch, objective: ObjectiveConfig) -> dict[str, Tensor]:
        if batch.actions is None:
            return {}
        is_latent_A = torch.zeros_like(batch.weight_A).index_fill(0, batch.actions.latent_N, 1.0)
        out = {}
        for mode, of_mode_A in (("latent", is_latent_A), ("token", 1 - is_latent_A)):
            sums = objectives.surrogate(scored, replace(batch, weight_A=batch.weight_A * of_mode_A), objective).sums
            out[f"latent/ratio_mean_{mode}"] = torch.stack([sums["ratio"], sums["count"]])
            out[f"latent/clip_ratio_{mode}"] = torch.stack([sums["clip_low"] + sums["clip_high"], sums["count"]])
        noise_NK = scored.aux["noise_NK"]
        is_kept_NK = noise_NK > -torch.inf
        low, high = self.config.noise_bounds
        count = is_kept_NK.sum().float()
        if high > low:  # without noise there is no interval
            used_NK = (noise_NK - low) / (high - low)
            out["latent/noise_used"] = torch.stack([torch.where(is_kept_NK, used_NK, 0.0).sum(), count])
        out["latent/frac_passed"] = torch.stack([(is_kept_NK & (noise_NK < 0)).sum().float(), count])
        return out

    def group_statistics(self, group: Group) -> dict[str, Tensor]:
        is_cut = [r.finish == "length" for r in group.rollouts] if self.config.truncated != "kept" else [False]
        has_winner = self.first_winner(group) is not None
        return {"latent/frac_masked": torch.tensor([float(sum(is_cut)), float(len(group.rollouts))]),
                "latent/frac_first_selected": torch.tensor([float(has_winner), 1.0])}

    @torch.no_grad()
    def statistics(self, token_ids_T: Tensor, latent_T: Tensor, record_T: Record | None) -> dict[str, Tensor]:
        if record_T is None:
            return {}
        weights_TK, live_T = self.weights(record_T), latent_T.float()
        mixture_TD = self.embed(token_ids_T, latent_T, record_T).float()
        token_TD = self.embedding(token_ids_T).float()
        count = live_T.sum()

        def pair(value_T: Tensor) -> Tensor:
            return torch.stack([(value_T * live_T).sum(), count])

        return {
            "latent/mixture_entropy": pair(torch.special.entr(weights_TK).sum(dim=1)),
            "latent/effective_k": pair(1 / weights_TK.square().sum(dim=1)),
            "latent/norm_ratio": pair(mixture_TD.norm(dim=-1) / token_TD.norm(dim=-1).clamp_min(1e-12)),
        }


def _is_exported(folder: Path) -> bool:
    """Whether fastlatent.export wrote it of a run whose latents were mixtures."""
    try:
        run = json.loads((folder / "fastlatent.json").read_text())["config"]
        return "mixture_temperature" in run["method"] and (run["sft"] is None or run["sft"]["tokens_per_latent"] > 0)
    except (OSError, ValueError, LookupError, TypeError):  # no such file, or not one of ours
        return False
