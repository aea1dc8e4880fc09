"""A model of a known shape with random weights, for measuring where there is no network:
`python -m benches.random_model NAME DIR`.

Its tokenizer is made on the spot from the quickstart's sentences (byte-level, 1,000 tokens), so that prompts have about as many
tokens as with a real one. Ids beyond it, nearly all of the vocabulary, are drawn like any others and have no text.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from fastlatent.cli import Parser, run_command
from fastlatent.data.word_problems import WordProblems
from fastlatent.errors import UserError

SHAPES = {
    # as published in Qwen/Qwen2.5-1.5B's config.json
    "qwen2.5-1.5b": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                     "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
    # heads of 32, the least that vLLM attends with on a CPU
    "tiny": {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "tie_word_embeddings": True}}

END = "<|im_end|>"
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    problems = WordProblems(WordProblems.Config(), 0).train
    sentences = [problems[i].question for i in range(0, len(problems), 97)]
    backend.train_from_iterator([*sentences, "user system assistant #### \n"], trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[END, "<|im_start|>"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
    fast.chat_template = TEMPLATE
    return fast


def save(name: str, folder: Path) -> None:
    """Write the model in bfloat16 and its tokenizer; the same weights on every machine of one kind of device."""
    words = tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[name], max_position_embeddings=32768, eos_token_id=words.eos_token_id,
                         pad_token_id=words.pad_token_id, bos_token_id=None)
    # a billion normal numbers take a CPU half a minute
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    words.save_pretrained(folder)
    model.save_pretrained(folder)


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m benches.random_model", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    if args.folder.exists() and any(args.folder.iterdir()):
        raise UserError(f"{args.folder} is not empty")
    save(args.name, args.folder)
    print(f"{args.name} with random weights in {args.folder}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
