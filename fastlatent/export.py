"""Hand a trained run on: `python -m fastlatent.export RUN DIR` writes a plain Hugging Face checkpoint, adapters merged, and
beside it the method's own parameters (`method.safetensors`) with what rebuilds them (`fastlatent.json`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import mkdtemp

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from fastlatent import __version__
from fastlatent.cli import Parser, check_writable, run_command
from fastlatent.config import to_dict
from fastlatent.errors import UserError
from fastlatent.policy import DTYPES
from fastlatent.trained import Trained, add_arguments, open_run, run_config


@torch.no_grad()
def export(trained: Trained, folder: Path, dtype: torch.dtype) -> None:
    """Write everything into a temporary neighbour, then rename: `folder` is complete or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tensors = dict(trained.policy.published())
        method = {name.removeprefix("method."): t.contiguous() for name, t in tensors.items() if name.startswith("method.")}
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(trained.policy.base.config, dtype=dtype)
        model.tie_weights()
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
        model.config._attn_implementation = "sdpa"  # the plain model reads with stock attention
        model.generation_config = trained.policy.base.generation_config
        model.save_pretrained(temporary)
        trained.tokenizer.save_pretrained(temporary)
        if method:
            save_file(method, temporary / "method.safetensors", {"format": "pt"})
        (temporary / "fastlatent.json").write_text(json.dumps(
            {"version": __version__, "checkpoint": trained.path.name, "config": to_dict(trained.config)}, indent=1))
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m fastlatent.export", description=__doc__)
    add_arguments(parser)
    parser.add_argument("dir", metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32",
                        help="of the weights (default: float32, the masters')")
    args = parser.parse_args(argv)
    folder = Path(args.dir)
    if folder.exists():
        raise UserError(f"{folder}: exists already; wanted a new folder")
    run_config(args.run)
    check_writable("DIR", folder)
    trained = open_run(args.run, args.checkpoint, args.device)
    try:
        export(trained, folder, DTYPES[args.dtype])
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk by an error of its own
        raise UserError(f"DIR: {folder} cannot be written ({getattr(error, 'strerror', None) or error})") from error
    print(f"{folder}: {trained.path.name} of {args.run} as a Hugging Face checkpoint"
          + (" with method.safetensors" if (folder / "method.safetensors").exists() else ""))


if __name__ == "__main__":
    run_command(main)
