"""Imitate demonstrations: `python -m fastlatent.sft RECIPE [more.yaml ...] [key=value ...]`.

With sft.tokens_per_latent it is latent SFT: from a text model it makes one that reasons in mixtures of tokens, where
Latent-GRPO (arXiv:2604.27998) begins. Without, it is plain cold-start SFT. Run folder, data, resumption and evaluation are
training's, and `python -m fastlatent.export` makes of the run a folder that `model.path` of a later run takes.

Source: Latent-SFT (arXiv:2510.15522): latents are mixtures of the vocabulary, predicted under a KL beside the answer's
cross-entropy, and read as noisy Gumbel-softmax samples. Deviations: there an encoder, trained in a stage of its own, finds the
mixtures that a chain compresses into, over the whole vocabulary; here runs of the chain's own tokens are the mixtures
(demonstration.py), which costs no training and bounds K. Noise is that of the method that will draw them.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch starts its threads, for the reason given in train.py

from fastlatent.cli import parse_args, run_command  # noqa: E402


def main(argv: list[str]) -> int:
    layers, overrides = parse_args(argv, "sft")
    from fastlatent.config import load_config

    config = load_config(*layers, overrides=overrides)
    from fastlatent.guard import TrainingDiverged
    from fastlatent.rollout.failure import EngineFailed
    from fastlatent.sft_trainer import SftTrainer

    try:
        SftTrainer(config, argv).run()
    except (TrainingDiverged, EngineFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_command(main)
