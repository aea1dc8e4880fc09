"""liger-kernel's parts in a tiny policy, run by Triton's interpreter in a process of its own: how far hidden states and
gradients are from the policy's without them. Prints one line of JSON per architecture.

The interpreter of Triton 3.6 takes no float arguments and no functions of libdevice: both are given to it here.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

import liger_kernel.ops.rms_norm  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from fastlatent.models import liger  # noqa: E402
from fastlatent.packing import Item, pack  # noqa: E402
from fastlatent.schema import AnswerConfig, ObjectiveConfig, ThinkingConfig  # noqa: E402
from fastlatent.types import Sampling  # noqa: E402

convert = interpreter._implicit_cvt


def converted(arg):
    if isinstance(arg, float):
        return tl.core.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
    return convert(arg)


interpreter._implicit_cvt = converted
liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)
liger.check = lambda *_: None  # it refuses a CPU


def learnt(policy, batch) -> dict[str, torch.Tensor]:
    """Hidden states and every gradient of a loss on them."""
    out = {"hidden": policy.hidden(batch).detach()}
    policy.loss(batch, 0.8, ObjectiveConfig()).value.backward()
    return out | {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}


for family in sys.argv[1:]:
    plain = tiny.policy("hrpo", family=family)
    drawn = tiny.engine(plain, ThinkingConfig(max_tokens=6), AnswerConfig(max_tokens=3)).generate(
        tiny.requests(tiny.prompts([3, 7]), 2), Sampling(max_new_tokens=10))
    batch = pack([Item(r, 1.0 - i % 2 * 2.0, 0.1) for i, r in enumerate(drawn)], torch.device("cpu"), True)
    wanted = learnt(plain, batch)
    fused = tiny.policy("hrpo", family=family, liger=True)
    got = learnt(fused, batch)
    assert got.keys() == wanted.keys()
    layer = fused.base.model.layers[0]
    rope = type(layer.self_attn).forward.__globals__["apply_rotary_pos_emb"]
    error = {name: float((got[name] - x).abs().max() / x.abs().max()) for name, x in wanted.items()}
    print(json.dumps({
        "family": family, "hidden": error.pop("hidden"), "gradient": max(error.values()), "is_same": torch.equal(
            got["hidden"], wanted["hidden"]), "patched": [f.__module__.partition(".")[0] for f in (
                layer.mlp.forward, layer.input_layernorm.forward, fused.base.model.norm.forward, rope)]}))
