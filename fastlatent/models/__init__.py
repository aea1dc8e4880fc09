"""Stock models: what `model.path` may say, and loading it with errors in one sentence.

`smollm2` and `convert` make the quickstart model, `files` tells one model from another, `supported` says what can be trained,
and `attention`, `flash`, `liger` and `recompute` are how its blocks are computed here.
"""

from __future__ import annotations

import difflib
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from fastlatent.errors import UserError
from fastlatent.models.files import model_files
from fastlatent.models.smollm2 import SMOLLM2, fetch

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def resolve_model(path: str) -> str:
    """What `from_pretrained` takes for `model.path`: a folder, or a hub name passed through.

    `smollm2-135m-instruct` is the quickstart model, fetched at its first use. Anything else that looks like a path
    must be a folder with a config.json; UserError where it is not.
    """
    if path == SMOLLM2.name:
        return str(fetch())
    if not path:
        raise UserError("model.path: wanted a Hugging Face folder or hub name")
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        if not (folder / "config.json").is_file() and (folder / "config.yaml").is_file():
            raise UserError(f"model.path: {path} is a run folder; wanted a model, which python -m fastlatent.export {path} DIR "
                            "makes of it")
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path: {path} is no Hugging Face folder: it holds no config.json")
        return str(folder)
    if folder.exists():
        raise UserError(f"model.path: {path} is a file; wanted a Hugging Face folder")
    if path[0] in "./~" or path.count("/") > 1:
        raise UserError(f"model.path: there is no folder {path!r}")
    return path


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, as `resolve_model` returned it; UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise _refusal("tokenizer", path, error) from None


def load_causal_lm(path: str, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model at `path` on the CPU in `dtype`, from safetensors only.

    UserError where there is none, it is damaged, or it lacks weights that transformers would fill with random numbers.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would tear the live view; so gigabytes may come in silence, but for this line
    if not Path(path).is_dir() and not model_files(path):
        print(f"fastlatent: fetching the weights of {path} from the Hugging Face hub", file=sys.stderr, flush=True)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True)
    except _expected_errors() as error:
        raise _refusal("causal language model", path, error) from None
    if missing := sorted(info["missing_keys"]):
        kind = type(model).__name__
        raise UserError(f"model.path: {path} lacks {len(missing)} weights of a {kind}, {missing[0]} first")
    return model


def skeleton(path: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The architecture of the model at `path`, without weights (on the meta device); UserError where there is none."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except _expected_errors() as error:
        raise _refusal("causal language model", path, error) from None


def head_size(config: PretrainedConfig) -> int:
    """Width of an attention head, which not every architecture writes down."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _expected_errors() -> tuple[type[Exception], ...]:
    """What transformers raises for a model that is not there, not known, not whole, or wants an absent package."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return OSError, ValueError, RuntimeError, ImportError, SafetensorError, StrictDataclassError


def _refusal(kind: str, path: str, error: Exception) -> UserError:
    reason = textwrap.shorten(str(error), 300) or type(error).__name__
    hint = f"; did you mean {SMOLLM2.name!r}?" if difflib.get_close_matches(path, [SMOLLM2.name]) else ""
    return UserError(f"model.path: no {kind} could be loaded from {path!r}{hint} ({reason})")
