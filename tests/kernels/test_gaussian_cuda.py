"""The arithmetic of csrc/cuda/gaussian_reparam.cu compiled for this processor, and its launch: it has never run."""

import ctypes
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastlatent_kernels import gaussian_reparam
from fastlatent_kernels.gaussian_reparam import cuda_impl, operators

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
# one position, as a warp of the kernel walks it; source: 0 draws eps from the noise, 1 takes it, 2 takes z
SHIM = """
#include "gaussian_math.h"
using namespace fastlatent;
extern "C" void position(const float* mean, const float* logvar, const float* given, int source, int64_t seed,
                         const int64_t* counter, int width, float free_bits, const float* g_z, const float* g_row,
                         float* z, float* row, float* d_mean, float* d_logvar) {
  const LatentNoise noise(seed, counter);
  RowSums sums;
  RowGradients g;
  g.kl = g_row[0], g.logprob = g_row[1], g.variance = g_row[2] / width;
  for (int d = 0; d < width; d++) {
    const Posterior q(mean[d], logvar[d]);
    const float eps = source == 2 ? 0 : source == 1 ? given[d] : inverse_normal(noise.uniform(d));
    z[d] = source == 2 ? given[d] : q.mean + q.sigma * eps;
    sums.add(q, z[d], free_bits);
    differentiate(q, z[d], eps, source == 2 ? 0 : g_z[d], g, free_bits, d_mean + d, d_logvar + d);
  }
  row[0] = sums.kl, row[1] = -0.5f * sums.square, row[2] = sums.variance / width;
}
"""


@pytest.fixture(scope="module")
def position(tmp_path_factory):
    built = tmp_path_factory.mktemp("gaussian") / "position.so"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*compiler, f"-I{CUDA}", "-x", "c++", "-", "-o", built], input=SHIM, text=True, check=True)
    return ctypes.CDLL(str(built)).position


@pytest.mark.parametrize("source", [0, 1, 2])
def test_a_position_equals_the_reference_and_its_gradients(position, source):
    g = torch.Generator().manual_seed(0)
    mean_1D, logvar_1D, given_1D, g_z_1D = (torch.randn(1, 300, generator=g) for _ in range(4))
    logvar_1D[0, :5] = torch.tensor([80.0, -80.0, 90.0, -90.0, 0.0])
    mean_1D[0, [1, 3]] = given_1D[0, [1, 3]] = 0.25  # a given z 10**17 deviations off would drown the rest
    seed, counter_13 = torch.tensor(-3 - 2**40), torch.tensor([[2**31 + 1, 2**32 - 1, 65536 * 7 + 3]])
    g_row_3 = torch.tensor([0.7, -1.3, 0.4])
    sources = ({"seed": seed, "counter_T3": counter_13}, {"eps_TD": given_1D}, {"z_TD": given_1D})

    # the huge variance of the first dimensions would drown the sums of a row: its outputs are compared without them
    for first in (0, 5):
        inputs = [x[:, first:].contiguous() for x in (mean_1D, logvar_1D)]
        taken = {name: x[:, first:].contiguous() if name in ("eps_TD", "z_TD") else x
                 for name, x in sources[source].items()}
        leaves = [x.double().requires_grad_() for x in inputs]
        doubles = {name: x.double() if x.is_floating_point() else x for name, x in taken.items()}
        want = gaussian_reparam(*leaves, 0.2, **doubles, backend="reference")
        total = (want.z_TD * g_z_1D[:, first:]).sum() + (torch.stack(want[1:]) * g_row_3[:, None]).sum()
        d_want = torch.autograd.grad(total, leaves)

        z, d_mean, d_logvar = (torch.empty(300 - first) for _ in range(3))
        row = torch.empty(3)
        given, g_z = given_1D[:, first:].contiguous(), g_z_1D[:, first:].contiguous()
        at = lambda tensor: ctypes.c_void_p(tensor.data_ptr())
        position(at(inputs[0]), at(inputs[1]), at(given), source, ctypes.c_int64(seed.item()), at(counter_13),
                 300 - first, ctypes.c_float(0.2), at(g_z), at(g_row_3), at(z), at(row), at(d_mean), at(d_logvar))
        torch.testing.assert_close(z, want.z_TD[0].float(), rtol=3e-6, atol=1e-6)
        torch.testing.assert_close(row, torch.cat(want[1:]).float(), rtol=1e-5, atol=0)
        for got, exact in zip((d_mean, d_logvar), d_want, strict=True):
            torch.testing.assert_close(got, exact[0].float(), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("source", ["noise", "eps", "z"])
def test_the_launch_fills_the_struct(source, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    mean_TD, rows_T = torch.zeros(3, 5, dtype=torch.bfloat16), torch.zeros(3)
    inputs = operators.Inputs(mean_TD, mean_TD, 0.25, None, None, mean_TD, source)
    launched = []
    # the real struct refuses a field it has not, and a value of another type
    for kernel, run, rest in (("gaussian_reparam_forward", cuda_impl._forward, (mean_TD, rows_T, rows_T, rows_T)),
                              ("gaussian_reparam_backward", cuda_impl._backward,
                               (operators.Gradients(None, rows_T, None, rows_T), mean_TD, mean_TD))):
        monkeypatch.setattr(cuda_impl._cuda, kernel, lambda *arguments: launched.append(arguments))
        run(inputs, *rest)
    for arguments, stream, _ in launched:
        assert (arguments.rows, arguments.width, arguments.free_bits, arguments.is_bf16) == (3, 5, 0.25, True)
        assert arguments.source == getattr(cuda_impl._cuda.Source, source) and stream == 7
    assert len(launched) == 2


def test_the_cuda_backend_says_what_it_cannot_take():
    mean_TD = torch.zeros(2, 3)
    assert gaussian_reparam.why_not("cuda", mean_TD, mean_TD, eps_TD=mean_TD) == "cuda takes CUDA tensors"
