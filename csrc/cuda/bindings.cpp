// fastlatent_kernels._cuda: the table of contents of the CUDA kernels. It imports where there is no GPU and no driver,
// for the CUDA runtime is linked in and looks for the driver at the first call.
//
// Beside it for every op a <op>.cu and its <op>.h: the struct its launcher takes, and the launcher, which returns null
// or what is wrong. Units in sm90/ are for sm_90a alone. Addresses arrive as integers, checked in Python.
#include "../binding.h"

#include <stdexcept>

#include "gaussian_reparam.h"
#include "hrpo_gate_decode.h"
#include "sm90/vocab_head.h"

namespace py = pybind11;
using namespace fastlatent;

namespace {

// A function of arguments, stream (cudaStream_t as an integer) and device that raises what the launcher says.
template <class Args>
auto launch(const char* (*launcher)(const Args&, void*, int)) {
  return [launcher](const Args& args, uintptr_t stream, int device) {
    const char* wrong;
    {
      py::gil_scoped_release release;
      wrong = launcher(args, reinterpret_cast<void*>(stream), device);
    }
    if (wrong) throw std::runtime_error(wrong);
  };
}

template <class Args>
py::class_<Args> gaussian_type(py::module_& m, const char* name) {
  py::class_<Args> type(m, name);
  type.def(py::init<>());
  address(type, "mean", &GaussianInputs::mean);
  address(type, "logvar", &GaussianInputs::logvar);
  address(type, "given", &GaussianInputs::given);
  address(type, "seed", &GaussianInputs::seed);
  address(type, "counter", &GaussianInputs::counter);
  type.def_readwrite("is_bf16", &Args::is_bf16)
      .def_readwrite("source", &Args::source)
      .def_readwrite("rows", &Args::rows)
      .def_readwrite("width", &Args::width)
      .def_readwrite("free_bits", &Args::free_bits);
  return type;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastlatent_kernels; call them through the ops, which check and choose.";

  py::class_<HrpoGateDecode> decode(m, "HrpoGateDecode");
  decode.def(py::init<>());
  address(decode, "token_ids", &HrpoGateDecode::token_ids);
  address(decode, "mixture", &HrpoGateDecode::mixture);
  address(decode, "table", &HrpoGateDecode::table);
  address(decode, "weight", &HrpoGateDecode::weight);
  address(decode, "bias", &HrpoGateDecode::bias);
  address(decode, "lambda", &HrpoGateDecode::lambda);
  address(decode, "latent", &HrpoGateDecode::latent);
  address(decode, "out", &HrpoGateDecode::out);
  decode.def_readwrite("rows", &HrpoGateDecode::rows)
      .def_readwrite("width", &HrpoGateDecode::width)
      .def_readwrite("vocab", &HrpoGateDecode::vocab)
      .def_readwrite("compat_eps", &HrpoGateDecode::compat_eps);
  m.def("hrpo_gate_decode", launch(&hrpo_gate_decode));

  py::class_<OnePassHead> head(m, "OnePassHead");
  head.def(py::init<>());
  address(head, "hidden", &OnePassHead::hidden);
  address(head, "weight", &OnePassHead::weight);
  address(head, "seed", &OnePassHead::seed);
  address(head, "counter", &OnePassHead::counter);
  address(head, "token", &OnePassHead::token);
  address(head, "logprob", &OnePassHead::logprob);
  address(head, "entropy", &OnePassHead::entropy);
  address(head, "mixture", &OnePassHead::mixture);
  address(head, "parts", &OnePassHead::parts);
  address(head, "logits", &OnePassHead::logits);
  address(head, "mixtures", &OnePassHead::mixtures);
  head.def_readwrite("rows", &OnePassHead::rows)
      .def_readwrite("vocab", &OnePassHead::vocab)
      .def_readwrite("width", &OnePassHead::width)
      .def_readwrite("inv_temperature", &OnePassHead::inv_temperature)
      .def_readwrite("greedy", &OnePassHead::greedy)
      .def_readwrite("clusters", &OnePassHead::clusters);
  m.def("one_pass_head", launch(&one_pass_head));
  m.def("one_pass_clusters", [](int64_t width, int device) {
    int64_t clusters = 0;
    if (const char* wrong = one_pass_clusters(width, device, &clusters)) throw std::runtime_error(wrong);
    return clusters;
  }, "How many clusters for this width a device can run at once.");

  py::enum_<Source>(m, "Source")
      .value("noise", Source::kNoise)
      .value("eps", Source::kEps)
      .value("z", Source::kZ);
  auto forward = gaussian_type<GaussianForward>(m, "GaussianForward");
  address(forward, "z", &GaussianForward::z);
  address(forward, "kl", &GaussianForward::kl);
  address(forward, "logprob", &GaussianForward::logprob);
  address(forward, "variance", &GaussianForward::variance);
  m.def("gaussian_reparam_forward", launch(&gaussian_reparam_forward));

  auto backward = gaussian_type<GaussianBackward>(m, "GaussianBackward");
  address(backward, "g_z", &GaussianBackward::g_z);
  address(backward, "g_kl", &GaussianBackward::g_kl);
  address(backward, "g_logprob", &GaussianBackward::g_logprob);
  address(backward, "g_variance", &GaussianBackward::g_variance);
  address(backward, "d_mean", &GaussianBackward::d_mean);
  address(backward, "d_logvar", &GaussianBackward::d_logvar);
  m.def("gaussian_reparam_backward", launch(&gaussian_reparam_backward));
}
