"""Imitate demonstrations: `python -m fastlatent.sft RECIPE [more.yaml ...] [key=value ...]`.

With sft.tokens_per_latent it is latent SFT: from a text model it makes one that reasons in mixtures of tokens, where
Latent-GRPO (arXiv:2604.27998) begins. Without, it is plain cold-start SFT. Run folder, data, resumption and evaluation are
training's, and `python -m fastlatent.export` makes of the run a folder that `model.path` of a later run takes.

`demonstration` is what is imitated, `trainer` the loop, `update` what is learnt.

Source: Latent-SFT (arXiv:2510.15522): latents are mixtures of the vocabulary, predicted under a KL beside the answer's
cross-entropy, and read as noisy Gumbel-softmax samples. Deviations: there an encoder, trained in a stage of its own, finds the
mixtures that a chain compresses into, over the whole vocabulary; here runs of the chain's own tokens are the mixtures
(demonstration.py), which costs no training and bounds K. Noise is that of the method that will draw them.
"""
