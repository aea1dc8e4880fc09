"""fastlatent trains language models that reason in latent vectors."""

__version__ = "0.1.0"


def __getattr__(name: str):
    # lazy: a reward worker imports this package and must not pay for torch
    if name == "Trainer":
        from fastlatent.trainer import Trainer
        return Trainer
    if name == "load_config":
        from fastlatent.config import load_config
        return load_config
    raise AttributeError(f"module 'fastlatent' has no attribute {name!r}")
