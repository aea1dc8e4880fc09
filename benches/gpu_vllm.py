"""What a bare machine with a GPU needs to run stock vLLM, cut to what can be carried there.

The wheel of vLLM 0.26.0 has 304 MB, most of it code for other GPUs and for models that fastlatent does not train. `cut_down`
leaves both out and 33 MB over, and changes nothing else: what is installed is the released Python and, of the machine code,
what this GPU loads. Standard library only.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import zipfile
from fnmatch import fnmatch
from pathlib import Path

from benches import gpu_fatbin

ARCHITECTURE = 90
"""Hopper: of the H100, H200 and GH200."""

LEFT_OUT = (
    "vllm/vllm_flash_attn/_vllm_fa2_C*",  # a Hopper has FlashAttention 3
    "vllm/_moe_C*", "vllm/_flashmla*", "vllm/_qutlass*", "vllm/third_party/deep_gemm/*", "vllm/third_party/fmha_sm100/*",
    "vllm/third_party/tml_fa4/*",  # mixtures of experts, DeepSeek's attention, 4 bits, Blackwell
    "vllm/vllm-rs", "vllm/_rust_tool_parser*", "vllm/entrypoints/serve/instrumentator/static/*", "*.jpg",  # of the server
)
"""Files of the wheel that a Llama, Qwen2 or Qwen3 in a `vllm.LLM` does without. vLLM asks whether they are there."""


def cut_down(wheel: Path, folder: Path) -> Path:
    """Write `wheel` into `folder`, for one GPU and compressed with LZMA, which pip unpacks; its build tag says so."""
    name, version, *tags = wheel.name.split("-")
    out = folder / "-".join((name, version, f"1sm{ARCHITECTURE}", *tags))
    record_name = f"{name}-{version}.dist-info/RECORD"
    record = []
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as new:
        for info in old.infolist():
            if info.filename == record_name or any(fnmatch(info.filename, pattern) for pattern in LEFT_OUT):
                continue
            content = old.read(info)
            if info.filename.endswith(".so"):
                content = gpu_fatbin.keep_only(content, ARCHITECTURE)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append((info.filename, f"sha256={digest}", len(content)))
            info.compress_type = zipfile.ZIP_LZMA
            new.writestr(info, content)
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([*record, (record_name, "", "")])
        new.writestr(record_name, table.getvalue())
    return out
