"""What a model's files hold, told apart at little cost: a run goes on with the model it was started with, or not at all.

config.json and the tokenizer, which says what an id means, are hashed whole. Of a file of weights its size is, and PAGES pages
spread from its first number to its last: weights that were trained on or merged differ all over, and gigabytes need not be
read.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from os import SEEK_END
from pathlib import Path

from fastlatent.errors import UserError

WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
"""Names of the files that `from_pretrained` reads weights from."""

TOKENIZER = ("added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "tokenizer.json",
             "tokenizer.model", "tokenizer_config.json", "vocab.json")
"""Names of the files that `AutoTokenizer` reads the tokenizer of a Llama or Qwen from, and the text around a prompt."""

PAGES, PAGE_BYTES = 64, 4096


def model_files(path: str) -> dict[str, str]:
    """A digest by file name of the model at `path`, as `resolve_model` returned it; nothing for one that the hub has yet to
    send. UserError where a file cannot be read."""
    folder = Path(path) if Path(path).is_dir() else _cached(path)
    try:
        weights = sorted(file for file in folder.iterdir() if WEIGHTS.fullmatch(file.name)) if folder else []
        digests = {file.name: _digest_of_weights(file) for file in weights}
        whole = ["config.json", *(name for name in TOKENIZER if (folder / name).exists())] if weights else []
        return {name: _digest(folder / name) for name in whole} | digests
    except OSError as error:
        raise UserError(f"model.path: {error.filename} cannot be read ({error.strerror})") from None


def _cached(name: str) -> Path | None:
    """Where the hub's own cache keeps the model of this name; None where it does not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no name of a model; whoever loads it says so
        return None
    return Path(config).parent if isinstance(config, str) else None


def _digest(file: Path) -> str:
    return blake2b(file.read_bytes(), digest_size=16).hexdigest()


def _digest_of_weights(file: Path) -> str:
    with file.open("rb") as content:
        # from the first number on: what stands before may be written in another way by another version of safetensors
        header, end = content.read(8), content.seek(0, SEEK_END)
        start = min(8 + int.from_bytes(header, "little"), end)
        digest = blake2b(b"%d" % (end - start), digest_size=16)
        for page in range(PAGES):
            content.seek(start + page * max(end - start - PAGE_BYTES, 0) // (PAGES - 1))
            digest.update(content.read(PAGE_BYTES))
    return digest.hexdigest()
