// The one file that knows pybind11. Addresses travel as integers: the extension neither includes nor links torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/chunk.h"
#include "cpu/draw.h"
#include "generated/divergence_list.h"
#include "params.h"

namespace py = pybind11;
namespace dk = distill_kernels;

namespace {

template <class T>
T* pointer(py::handle address) {
  return reinterpret_cast<T*>(address.cast<uintptr_t>());
}

dk::Matrix matrix(const py::tuple& from) {
  return {pointer<const void>(from[0]), static_cast<dk::Element>(from[1].cast<int>()), from[2].cast<int64_t>()};
}

dk::Quantised quantised(const py::tuple& from) {
  return {pointer<const int8_t>(from[0]), from[1].cast<int64_t>(), pointer<const float>(from[2])};
}

dk::Model model(const py::dict& from) {
  dk::Model m{matrix(from["hidden"]),        matrix(from["weight"]),        pointer<const float>(from["bias"]), from["dim"].cast<int64_t>(),
              from["scale"].cast<float>(), from["softcap"].cast<float>(), pointer<float>(from["logits"]),     {}};
  if (from.contains("quantised")) m.quantised = quantised(from["quantised"]);
  return m;
}

dk::ChunkParams params(const py::dict& from) {
  dk::ChunkParams p{};
  p.tokens = from["tokens"].cast<int64_t>();
  p.stride = from["stride"].cast<int64_t>();
  p.vocabulary = from["vocabulary"].cast<int64_t>();
  p.student = model(from["student"]);
  p.teacher = model(from["teacher"]);
  p.labels = pointer<const int64_t>(from["labels"]);
  p.coefficients = pointer<const float>(from["coefficients"]);
  p.terms = pointer<float>(from["terms"]);
  p.stats = pointer<float>(from["stats"]);
  p.d_hidden = pointer<float>(from["d_hidden"]);
  p.scores = pointer<float>(from["scores"]);
  const auto kept = from["kept"].cast<py::tuple>();
  p.kept = {kept[0].cast<int64_t>(), pointer<const int64_t>(kept[1]), pointer<const float>(kept[2]), pointer<float>(kept[3]),
            pointer<float>(kept[4])};
  if (from.contains("pilot")) {
    const auto pilot = from["pilot"].cast<py::tuple>();
    p.pilot = {pilot[0].cast<int64_t>(), pointer<const int64_t>(pilot[1])};
    p.errors = pointer<float>(from["errors"]);
  }
  if (from.contains("listed")) {
    const auto listed = from["listed"].cast<py::tuple>();
    p.listed = {listed[0].cast<int64_t>(), pointer<const int64_t>(listed[1]), pointer<const int64_t>(listed[2]), listed[3].cast<int64_t>(),
                pointer<float>(listed[4]), pointer<float>(listed[5]), pointer<const float>(listed[6]), pointer<const float>(listed[7])};
  }
  p.d_weight = pointer<float>(from["d_weight"]);
  p.d_bias = pointer<float>(from["d_bias"]);
  p.first = from["first"].cast<bool>();
  p.divergence = from["divergence"].cast<int>();
  const auto parameters = from["parameters"].cast<std::vector<float>>();
  for (size_t i = 0; i < parameters.size() && i < dk::kMaxParameters; ++i) p.parameters[i] = parameters[i];
  p.temperature = from["temperature"].cast<float>();
  p.label_smoothing = from["label_smoothing"].cast<float>();
  p.log_probability_floor = from["log_probability_floor"].cast<float>();
  p.tail_log_probability = from["tail_log_probability"].cast<float>();
  p.untempered = from["untempered"].cast<bool>();
  return p;
}

const char* name_or_null(const std::string& name) { return name.empty() ? nullptr : name.c_str(); }

[[noreturn]] void unknown_instruction_set(const std::string& name) {
  throw std::invalid_argument("instruction set '" + name + "' is not available here");
}

void run_chunk(const py::dict& from, uintptr_t scratch, int threads, const std::string& instruction_set, dk::Stage stage) {
  const dk::ChunkParams p = params(from);
  bool ran;
  {
    py::gil_scoped_release unlocked;
    ran = dk::run_chunk(p, stage, threads, reinterpret_cast<float*>(scratch), name_or_null(instruction_set));
  }
  if (!ran) unknown_instruction_set(instruction_set);
}

int64_t chunk_scratch_floats(const py::dict& from, int threads, const std::string& instruction_set) {
  const int64_t floats = dk::chunk_scratch_floats(params(from), threads, name_or_null(instruction_set));
  if (floats < 0) unknown_instruction_set(instruction_set);
  return floats;
}

void draw_columns(uintptr_t scores, int64_t vocabulary, int64_t kept, int64_t uniform, uintptr_t units, uintptr_t columns, uintptr_t weights) {
  py::gil_scoped_release unlocked;
  dk::draw_columns(reinterpret_cast<const float*>(scores), vocabulary, kept, uniform, reinterpret_cast<int64_t*>(units),
                   reinterpret_cast<int64_t*>(columns), reinterpret_cast<float*>(weights));
}

void quantise_rows(uintptr_t address, int element, int64_t stride, int64_t rows, int64_t dim, uintptr_t out, uintptr_t scales, int threads,
                   const std::string& instruction_set) {
  bool ran;
  {
    py::gil_scoped_release unlocked;
    const dk::Matrix matrix{reinterpret_cast<const void*>(address), static_cast<dk::Element>(element), stride};
    std::vector<float> scratch(threads * 2 * ((dim + dk::kTurn - 1) / dk::kTurn * dk::kTurn));
    ran = dk::quantise_rows(matrix, rows, dim, reinterpret_cast<int8_t*>(out), reinterpret_cast<float*>(scales), threads, scratch.data(),
                            name_or_null(instruction_set));
  }
  if (!ran) unknown_instruction_set(instruction_set);
}

void math_function(char which, uintptr_t in, uintptr_t out, int64_t count, const std::string& instruction_set) {
  if (!dk::run_math_function(which, reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), count, name_or_null(instruction_set)))
    unknown_instruction_set(instruction_set);
}

void multiply(uintptr_t a, uintptr_t b, uintptr_t c, int64_t rows, int64_t depth, const std::string& instruction_set) {
  if (!dk::run_multiply(reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b), reinterpret_cast<float*>(c), rows, depth,
                        name_or_null(instruction_set)))
    unknown_instruction_set(instruction_set);
}

double multiply_add_rate(int64_t count, const std::string& instruction_set) {
  const double rate = dk::multiply_add_rate(count, name_or_null(instruction_set));
  if (rate < 0.0) unknown_instruction_set(instruction_set);
  return rate;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const char* const* name = dk::available_instruction_sets(); *name != nullptr; ++name) names.push_back(*name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of distill_kernels; called by distill_kernels.backends.native.";
  py::enum_<dk::Stage>(m, "Stage")
      .value("whole", dk::Stage::kWhole)
      .value("scores", dk::Stage::kScores)
      .value("gradients", dk::Stage::kGradients)
      .value("gather", dk::Stage::kGather)
      .value("multiply", dk::Stage::kMultiply)
      .value("sweep", dk::Stage::kSweep)
      .value("correct", dk::Stage::kCorrect)
      .value("exact", dk::Stage::kExact)
      .value("listed", dk::Stage::kListed)
      .value("listed_gradients", dk::Stage::kListedGradients);
  m.def("run_chunk", &run_chunk, py::arg("chunk"), py::arg("scratch"), py::arg("threads"), py::arg("instruction_set"),
        py::arg("stage") = dk::Stage::kWhole);
  m.def("chunk_scratch_floats", &chunk_scratch_floats, py::arg("chunk"), py::arg("threads"), py::arg("instruction_set"));
  m.def("draw_columns", &draw_columns, py::arg("scores"), py::arg("vocabulary"), py::arg("kept"), py::arg("uniform"), py::arg("units"),
        py::arg("columns"), py::arg("weights"));
  m.def("quantise_rows", &quantise_rows, py::arg("matrix"), py::arg("element"), py::arg("stride"), py::arg("rows"), py::arg("dim"),
        py::arg("out"), py::arg("scales"), py::arg("threads"), py::arg("instruction_set"));
  m.def("math_function", &math_function, py::arg("which"), py::arg("input"), py::arg("output"), py::arg("count"), py::arg("instruction_set"));
  m.def("multiply", &multiply, py::arg("a"), py::arg("b"), py::arg("c"), py::arg("rows"), py::arg("depth"), py::arg("instruction_set"));
  m.def("multiply_add_rate", &multiply_add_rate, py::arg("count"), py::arg("instruction_set"));
  m.def("instruction_sets", &instruction_sets);
#define DK_NAME(name) #name,
  m.attr("divergences") = std::vector<std::string>{DK_FOR_EACH_DIVERGENCE(DK_NAME)};
#undef DK_NAME
  m.attr("token_alignment") = dk::kTokenAlignment;
  m.attr("panel") = dk::kPanel;
}
