"""The loop of trainer.py over demonstrations: what is read from the data takes the place of what is drawn and scored.

Held-out problems are still answered by the engine and scored by the rewards, so that the two stages are measured alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from fastlatent import build, step_metrics
from fastlatent.errors import UserError
from fastlatent.live import LiveView
from fastlatent.profiling import span
from fastlatent.rollout.failure import released
from fastlatent.schema import Config
from fastlatent.sft.demonstration import Demonstrator, rollout_of
from fastlatent.sft.update import SftUpdater
from fastlatent.trainer import Learnt, Trainer


class SftTrainer(Trainer):
    """`SftTrainer(load_config("latent_sft_quickstart")).run()`."""

    def __init__(self, config: Config, argv: Sequence[str] = ()):
        super().__init__(config, argv)
        self.update = SftUpdater(self.policy, self.optimizer, config)
        self.warnings = []  # a method's are about reinforcement learning

    def _check_purpose(self) -> None:
        config = self.config
        if config.sft is None:
            raise UserError(f"sft: {config.recipe} has no such section, which says how demonstrations are made; sft={{}} makes "
                            "them of text")
        K, most = config.sft.tokens_per_latent, build.method_of(config).mixture_size(config.method)
        if K and config.sft.chain is None:
            raise UserError(f"sft.tokens_per_latent: wanted 0, as with sft.chain=null there is nothing to compress, got {K}")
        if K and not most:
            raise UserError(f"sft.tokens_per_latent: wanted 0, as the latents of {config.method.name} are no mixtures of "
                            f"tokens that a chain could be compressed into, got {K}")
        if K > most:
            raise UserError(f"sft.tokens_per_latent: a mixture of {K} tokens is more than method.top_k={most}")

    def _check_prompts(self) -> None:
        self.demonstrator = Demonstrator(self.config, self.tokenizer)
        for prompt, source in self.inputs.each_prompt():
            self.demonstrator.write(prompt, source)

    def _probe(self, view: LiveView) -> None:
        """Nothing that the engine draws is learnt from."""

    def _learn(self, commit: Callable[[], None]) -> Learnt:
        config = self.config
        with span("step") as whole:
            prompts = self.inputs.prompts(self.step * config.num_prompts)
            written = [self.demonstrator.write(prompt, f"example {prompt.id}") for prompt in prompts]
            rollouts = [rollout_of(d, p, self.policy.method, config, self.step) for d, p in zip(written, prompts, strict=True)]
            whole.tokens = sum(len(rollout.token_ids) for rollout in rollouts)
            with nullcontext() if self.engine is None else released(self.engine):
                with span("update") as learning:
                    result = self.update(rollouts, commit)
                    learning.tokens = result.num_tokens
                self.step += 1
        return Learnt(result, step_metrics.of_demonstrations(self.step, rollouts, result, self.optimizer.lr))
