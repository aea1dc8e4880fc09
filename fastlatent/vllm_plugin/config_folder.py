"""The folder vLLM reads a model's configuration from: one and the same for the same configuration.

vLLM keeps what it has compiled by a hash of, among others, its model's path. A folder that is new at every start would have it
compile at every start, and keep it all.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from transformers import PretrainedConfig

from fastlatent.errors import UserError
from fastlatent.models.smollm2 import cache_dir


def config_folder(model: PretrainedConfig) -> Path:
    """`<cache>/vllm/<hash of config.json>`, with nothing but that file. UserError where it is not there and cannot be
    written."""
    cache, content = cache_dir() / "vllm", model.to_json_string().encode()
    file = cache / hashlib.sha256(content).hexdigest()[:16] / "config.json"
    try:
        if not file.exists() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".") as folder:
                fresh = Path(folder) / file.name
                fresh.write_bytes(content)
                fresh.replace(file)  # whole, for whoever else starts at this moment
    except OSError as error:
        raise UserError(f"engine: the model's configuration for vllm cannot be kept in {cache} ({error.strerror or error}); "
                        "FASTLATENT_CACHE chooses another folder") from None
    return file.parent
