// fastlatent_kernels._C: the table of contents of the native code.
//
// Addresses arrive as integers from the native_impl.py files, which have checked device, dtype, shape and contiguity.
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "binding.h"
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

  py::class_<VocabHeadBf16> vocab_head_bf16(m, "VocabHeadBf16");
  vocab_head_bf16.def(py::init<>())
      .def_static("splits", &VocabHeadBf16::splits, "Pieces of a vocabulary of this size.")
      .def_static("quads", &VocabHeadBf16::quads, "Quads that hold this many rows.")
      .def_static("draw_floats", [] { return sizeof(TileDraw) / sizeof(float); }, "What `draws` has for a split and a row.");
  address(vocab_head_bf16, "hidden", &VocabHeadBf16::hidden);
  address(vocab_head_bf16, "weight", &VocabHeadBf16::weight);
  address(vocab_head_bf16, "embed", &VocabHeadBf16::embed);
  address(vocab_head_bf16, "seed", &VocabHeadBf16::seed);
  address(vocab_head_bf16, "counter", &VocabHeadBf16::counter);
  address(vocab_head_bf16, "token", &VocabHeadBf16::token);
  address(vocab_head_bf16, "logprob", &VocabHeadBf16::logprob);
  address(vocab_head_bf16, "entropy", &VocabHeadBf16::entropy);
  address(vocab_head_bf16, "mixture", &VocabHeadBf16::mixture);
  address(vocab_head_bf16, "logits", &VocabHeadBf16::logits);
  address(vocab_head_bf16, "hidden_quads", &VocabHeadBf16::hidden_quads);
  address(vocab_head_bf16, "sums", &VocabHeadBf16::sums);
  address(vocab_head_bf16, "draws", &VocabHeadBf16::draws);
  address(vocab_head_bf16, "part", &VocabHeadBf16::part);
  vocab_head_bf16.def_readwrite("rows", &VocabHeadBf16::rows)
      .def_readwrite("vocab", &VocabHeadBf16::vocab)
      .def_readwrite("width", &VocabHeadBf16::width)
      .def_readwrite("embed_width", &VocabHeadBf16::embed_width)
      .def_readwrite("inv_temperature", &VocabHeadBf16::inv_temperature)
      .def_readwrite("greedy", &VocabHeadBf16::greedy)
      .def_readwrite("threads", &VocabHeadBf16::threads);
  m.def("has_vocab_head_bf16", [] { return vocab_head_bf16_kernel() != nullptr; },
        "Whether this processor takes vocab_head_bf16.");
  const auto run_bf16 = [](VocabHeadBf16Kernel (*choose)(), const char* name) {
    return [choose, name](const VocabHeadBf16& args) {
      const VocabHeadBf16Kernel kernel = choose();
      if (!kernel) throw std::invalid_argument(std::string(name) + ": this processor does not take it");
      py::gil_scoped_release release;
      kernel(args);
    };
  };
  m.def("vocab_head_bf16", run_bf16(vocab_head_bf16_kernel, "vocab_head_bf16"));
  m.def("head_logits_bf16", run_bf16(head_logits_bf16_kernel, "head_logits_bf16"));

  auto topk_mixture = rows_type<TopkMixture>(m, "TopkMixture");
  address(topk_mixture, "log_kept", &TopkMixture::log_kept);
  address(topk_mixture, "ids", &TopkMixture::ids);
  address(topk_mixture, "weights", &TopkMixture::weights);
  topk_mixture.def_readwrite("top_k", &TopkMixture::top_k).def_readwrite("top_p", &TopkMixture::top_p);
  m.def("topk_mixture", run(&CpuKernels::topk_mixture));

  auto topk_gumbel = rows_type<TopkGumbel>(m, "TopkGumbel");
  address(topk_gumbel, "ids", &TopkGumbel::ids);
  address(topk_gumbel, "score", &TopkGumbel::score);
  address(topk_gumbel, "weights", &TopkGumbel::weights);
  address(topk_gumbel, "log_kept", &TopkGumbel::log_kept);
  address(topk_gumbel, "num_candidates", &TopkGumbel::num_candidates);
  topk_gumbel.def_readwrite("top_k", &TopkGumbel::top_k)
      .def_readwrite("top_p", &TopkGumbel::top_p)
      .def_readwrite("low", &TopkGumbel::low)
      .def_readwrite("high", &TopkGumbel::high)
      .def_readwrite("shift", &TopkGumbel::shift)
      .def_readwrite("scale", &TopkGumbel::scale)
      .def_readwrite("inv_mixture_temperature", &TopkGumbel::inv_mixture_temperature);
  m.def("topk_gumbel", run(&CpuKernels::topk_gumbel));

  py::class_<HrpoGate> hrpo_gate(m, "HrpoGate");
  hrpo_gate.def(py::init<>());
  address(hrpo_gate, "u", &HrpoGate::u);
  address(hrpo_gate, "token", &HrpoGate::token);
  address(hrpo_gate, "mixture", &HrpoGate::mixture);
  address(hrpo_gate, "bias", &HrpoGate::bias);
  address(hrpo_gate, "log_scale", &HrpoGate::log_scale);
  address(hrpo_gate, "latent", &HrpoGate::latent);
  address(hrpo_gate, "out", &HrpoGate::out);
  hrpo_gate.def_readwrite("is_bf16", &HrpoGate::is_bf16)
      .def_readwrite("compat_eps", &HrpoGate::compat_eps)
      .def_readwrite("rows", &HrpoGate::rows)
      .def_readwrite("width", &HrpoGate::width)
      .def_readwrite("threads", &HrpoGate::threads);
  m.def("hrpo_gate", run(&CpuKernels::hrpo_gate));

  py::class_<HrpoGateBackward, HrpoGate> hrpo_gate_backward(m, "HrpoGateBackward");
  hrpo_gate_backward.def(py::init<>());
  address(hrpo_gate_backward, "grad", &HrpoGateBackward::grad);
  address(hrpo_gate_backward, "du", &HrpoGateBackward::du);
  address(hrpo_gate_backward, "dtoken", &HrpoGateBackward::dtoken);
  address(hrpo_gate_backward, "dmixture", &HrpoGateBackward::dmixture);
  address(hrpo_gate_backward, "partial", &HrpoGateBackward::partial);
  hrpo_gate_backward.def_readwrite("chunk_rows", &HrpoGateBackward::chunk_rows);
  m.def("hrpo_gate_backward", run(&CpuKernels::hrpo_gate_backward));

  py::class_<SoftEmbedding> soft_embedding(m, "SoftEmbedding");
  soft_embedding.def(py::init<>());
  address(soft_embedding, "ids", &SoftEmbedding::ids);
  address(soft_embedding, "weight", &SoftEmbedding::weight);
  address(soft_embedding, "table", &SoftEmbedding::table);
  address(soft_embedding, "grad", &SoftEmbedding::grad);
  address(soft_embedding, "place", &SoftEmbedding::place);
  address(soft_embedding, "begin", &SoftEmbedding::begin);
  address(soft_embedding, "out", &SoftEmbedding::out);
  address(soft_embedding, "scratch", &SoftEmbedding::scratch);
  soft_embedding.def_readwrite("is_bf16", &SoftEmbedding::is_bf16)
      .def_readwrite("rows", &SoftEmbedding::rows)
      .def_readwrite("mixed", &SoftEmbedding::mixed)
      .def_readwrite("vocab", &SoftEmbedding::vocab)
      .def_readwrite("width", &SoftEmbedding::width)
      .def_readwrite("threads", &SoftEmbedding::threads);
  m.def("soft_embedding", run(&CpuKernels::soft_embedding));
  m.def("soft_embedding_weight_gradient", run(&CpuKernels::soft_embedding_weight_gradient));
  m.def("soft_embedding_table_gradient", run(&CpuKernels::soft_embedding_table_gradient));
}
