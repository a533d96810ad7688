// The one file that knows pybind11. Addresses travel as integers: the extension neither includes nor links torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/row_kernel.h"
#include "generated/divergence_list.h"
#include "params.h"

namespace py = pybind11;
namespace dk = distill_kernels;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const char* name_or_null(const std::string& name) { return name.empty() ? nullptr : name.c_str(); }

void unknown_instruction_set(const std::string& name) {
  throw std::invalid_argument("instruction set '" + name + "' is not available here");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of distill_kernels; called by distill_kernels.backends.native.";

  m.def("row_kernel",
        [](int64_t tokens, int64_t stride, int64_t vocabulary, uintptr_t student, uintptr_t student_bias, float student_scale, float student_softcap,
           uintptr_t teacher, uintptr_t teacher_bias, float teacher_scale, float teacher_softcap, uintptr_t labels, uintptr_t coefficients,
           uintptr_t terms, uintptr_t stats, int divergence, const std::vector<float>& parameters, float temperature, float label_smoothing,
           float log_probability_floor, float tail_log_probability, bool untempered, bool gradient, int threads, const std::string& instruction_set) {
          dk::RowParams p{};
          p.tokens = tokens;
          p.stride = stride;
          p.vocabulary = vocabulary;
          p.student = {pointer<float>(student), pointer<const float>(student_bias), student_scale, student_softcap};
          p.teacher = {pointer<float>(teacher), pointer<const float>(teacher_bias), teacher_scale, teacher_softcap};
          p.labels = pointer<const int64_t>(labels);
          p.coefficients = pointer<const float>(coefficients);
          p.terms = pointer<float>(terms);
          p.stats = pointer<float>(stats);
          p.divergence = divergence;
          for (size_t i = 0; i < parameters.size() && i < dk::kMaxParameters; ++i) p.parameters[i] = parameters[i];
          p.temperature = temperature;
          p.label_smoothing = label_smoothing;
          p.log_probability_floor = log_probability_floor;
          p.tail_log_probability = tail_log_probability;
          p.untempered = untempered;
          p.gradient = gradient;
          bool ran;
          {
            py::gil_scoped_release unlocked;
            ran = dk::run_row_kernel(p, threads, name_or_null(instruction_set));
          }
          if (!ran) unknown_instruction_set(instruction_set);
        },
        py::kw_only(), py::arg("tokens"), py::arg("stride"), py::arg("vocabulary"), py::arg("student"), py::arg("student_bias"),
        py::arg("student_scale"), py::arg("student_softcap"), py::arg("teacher"), py::arg("teacher_bias"), py::arg("teacher_scale"),
        py::arg("teacher_softcap"), py::arg("labels"), py::arg("coefficients"), py::arg("terms"), py::arg("stats"), py::arg("divergence"),
        py::arg("parameters"), py::arg("temperature"), py::arg("label_smoothing"), py::arg("log_probability_floor"),
        py::arg("tail_log_probability"), py::arg("untempered"), py::arg("gradient"), py::arg("threads"), py::arg("instruction_set"));

  m.def("math_function",
        [](char which, uintptr_t in, uintptr_t out, int64_t count, const std::string& instruction_set) {
          if (!dk::run_math_function(which, pointer<const float>(in), pointer<float>(out), count, name_or_null(instruction_set)))
            unknown_instruction_set(instruction_set);
        },
        py::arg("which"), py::arg("input"), py::arg("output"), py::arg("count"), py::arg("instruction_set"));

  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const char* const* name = dk::available_instruction_sets(); *name != nullptr; ++name) names.push_back(*name);
    return names;
  });

#define DK_NAME(name) #name,
  m.attr("divergences") = std::vector<std::string>{DK_FOR_EACH_DIVERGENCE(DK_NAME)};
#undef DK_NAME
  m.attr("token_alignment") = dk::kTokenAlignment;
}
