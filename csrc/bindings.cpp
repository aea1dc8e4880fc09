// fastlatent_kernels._C: the table of contents of the native code.
//
// Addresses arrive as integers from the native_impl.py files, which have checked device, dtype, shape and contiguity.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace fastlatent;

namespace {

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const CpuKernels* row = cpu_kernels(); row->isa; row++) names.emplace_back(row->isa);
  return names;
}

const CpuKernels& kernels_for(const std::string& isa) {
  for (const CpuKernels* row = cpu_kernels(); row->isa; row++)
    if (isa.empty() || isa == row->isa) return *row;
  throw std::invalid_argument("isa: there are no kernels for '" + isa + "' on this processor");
}

// A function of arguments and instruction set ("": the best) that runs without the interpreter's lock.
template <class Args>
auto run(void (*CpuKernels::*kernel)(const Args&)) {
  return [kernel](const Args& args, const std::string& isa) {
    const CpuKernels& kernels = kernels_for(isa);
    py::gil_scoped_release release;
    (kernels.*kernel)(args);
  };
}

template <class Args, class Owner, class T>
void address(py::class_<Args>& type, const char* name, T* Owner::*field) {
  type.def_property(name, nullptr, [field](Args& args, uintptr_t at) { args.*field = reinterpret_cast<T*>(at); });
}

template <class Args>
py::class_<Args> rows_type(py::module_& m, const char* name) {
  py::class_<Args> type(m, name);
  type.def(py::init<>());
  address(type, "logits", &Rows::logits);
  address(type, "seed", &Rows::seed);
  address(type, "counter", &Rows::counter);
  address(type, "token", &Rows::token);
  address(type, "logprob", &Rows::logprob);
  address(type, "entropy", &Rows::entropy);
  address(type, "scratch", &Rows::scratch);
  type.def_readwrite("logits_bf16", &Args::logits_bf16)
      .def_readwrite("rows", &Args::rows)
      .def_readwrite("vocab", &Args::vocab)
      .def_readwrite("inv_temperature", &Args::inv_temperature)
      .def_readwrite("greedy", &Args::greedy)
      .def_readwrite("threads", &Args::threads);
  return type;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fastlatent_kernels; call them through the ops, which check and choose.";
  m.def("isas", &isas, "Instruction sets of this processor there are kernels for, best first.");
  m.def("scratch_floats", &scratch_floats, "Floats of scratch per thread for rows of this many logits.");

  auto vocab_head = rows_type<VocabHead>(m, "VocabHead");
  address(vocab_head, "unit_p", &VocabHead::unit_p);
  vocab_head.def_readwrite("unit_p_bf16", &VocabHead::unit_p_bf16);
  m.def("vocab_head", run(&CpuKernels::vocab_head));

  auto topk_mixture = rows_type<TopkMixture>(m, "TopkMixture");
  address(topk_mixture, "log_kept", &TopkMixture::log_kept);
  address(topk_mixture, "ids", &TopkMixture::ids);
  address(topk_mixture, "weights", &TopkMixture::weights);
  topk_mixture.def_readwrite("top_k", &TopkMixture::top_k).def_readwrite("top_p", &TopkMixture::top_p);
  m.def("topk_mixture", run(&CpuKernels::topk_mixture));
}
