// The CUDA kernels for Python: addresses and the stream travel as integers, and nothing of torch is included or linked. Importing it asks
// nothing of the machine; a driver is looked for by the first call that needs one.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "../generated/divergence_list.h"
#include "columns.h"
#include "limits.h"
#include "rows.h"
#include "sweep.h"

#ifdef DK_EMULATED
#include <cuda_emulation.h>
#endif

namespace py = pybind11;
namespace dk = distill_kernels;

namespace distill_kernels::cuda {
// Of statistics.cuh, which only a compiler of kernels reads.
#define DK_DECLARE(name) struct name;
DK_FOR_EACH_DIVERGENCE(DK_DECLARE)
#undef DK_DECLARE
struct no_divergence;
}  // namespace distill_kernels::cuda

namespace {

template <class T>
T* pointer(py::handle address) {
  return reinterpret_cast<T*>(address.cast<uintptr_t>());
}

dk::cuda::Head head(const py::dict& from) {
  return {pointer<const float>(from["bias"]), from["scale"].cast<float>(), from["softcap"].cast<float>()};
}

dk::cuda::Loss loss(const py::dict& from) {
  dk::cuda::Loss loss{};
  loss.tokens = from["tokens"].cast<int64_t>();
  loss.vocabulary = from["vocabulary"].cast<int>();
  loss.student = head(from["student"]);
  loss.teacher = head(from["teacher"]);
  loss.labels = pointer<const int64_t>(from["labels"]);
  loss.coefficients = pointer<const float>(from["coefficients"]);
  loss.terms = pointer<float>(from["terms"]);
  loss.stats = pointer<float>(from["stats"]);
  loss.inverse_temperature = from["inverse_temperature"].cast<float>();
  loss.label_smoothing = from["label_smoothing"].cast<float>();
  loss.floor = from["floor"].cast<float>();
  loss.tail_probability = from["tail_probability"].cast<float>();
  loss.has_teacher = from["has_teacher"].cast<bool>();
  loss.untempered = from["untempered"].cast<bool>();
  loss.separate = from["separate"].cast<bool>();
  loss.smoothing = from["smoothing"].cast<bool>();
  return loss;
}

dk::Element element(const py::handle& from) { return static_cast<dk::Element>(from.cast<int>()); }

using Parameters = std::array<float, dk::kMaxParameters>;

Parameters parameters_of(const std::vector<float>& given) {
  Parameters parameters{};
  if (given.size() > parameters.size()) {
    throw std::invalid_argument("a divergence has at most " + std::to_string(parameters.size()) + " parameters, these are " +
                                std::to_string(given.size()));
  }
  std::copy(given.begin(), given.end(), parameters.begin());
  return parameters;
}

using LaunchRows = void (*)(const dk::cuda::Loss&, const dk::cuda::Rows&, const dk::cuda::RowLaunch&, const float*, void*);
#define DK_LAUNCH_ROWS(name) &dk::cuda::launch_rows<dk::cuda::name>,
constexpr LaunchRows kLaunchRows[] = {DK_FOR_EACH_DIVERGENCE(DK_LAUNCH_ROWS)};
#undef DK_LAUNCH_ROWS

// `divergence`: its place in `divergences`; negative: none.
void rows(const py::dict& of_loss, const py::dict& of_rows, int divergence, const std::vector<float>& given, int device, uintptr_t stream) {
  const Parameters parameters = parameters_of(given);
  const dk::cuda::Rows rows{pointer<const float>(of_rows["student_logits"]), pointer<const float>(of_rows["teacher_logits"]),
                            pointer<void>(of_rows["dz"]),                    element(of_rows["dz_element"]),
                            pointer<const float>(of_rows["dz_scale"]),       of_rows["held_vectors"].cast<int>()};
  const dk::cuda::RowLaunch as{of_rows["cluster"].cast<unsigned>(), of_rows["threads"].cast<unsigned>()};
  dk::cuda::use_device(device);
  const auto launch = divergence < 0 ? &dk::cuda::launch_rows<dk::cuda::no_divergence> : kLaunchRows[divergence];
  launch(loss(of_loss), rows, as, parameters.data(), reinterpret_cast<void*>(stream));
}

dk::cuda::Multiplied multiplied(const py::dict& from) {
  const dk::Element of = element(from["element"]);
  return {{pointer<const void>(from["hidden"]), of, from["hidden_stride"].cast<int64_t>()},
          {pointer<const void>(from["weight"]), of, from["weight_stride"].cast<int64_t>()},
          from["dim"].cast<int>()};
}

void sweep(const py::dict& of_loss, const py::dict& of_sweep, int divergence, const std::vector<float>& given, int device, uintptr_t stream) {
  const Parameters parameters = parameters_of(given);
  dk::cuda::Sweep sweep{};
  sweep.loss = loss(of_loss);
  sweep.student = multiplied(of_sweep["student"]);
  sweep.teacher = multiplied(of_sweep["teacher"]);
  sweep.splits = of_sweep["splits"].cast<int>();
  sweep.split_entries = of_sweep["split_entries"].cast<int>();
  dk::cuda::use_device(device);
  dk::cuda::sweep(sweep, pointer<void>(of_sweep["workspace"]), divergence, parameters.data(),
                  static_cast<dk::cuda::Instructions>(of_sweep["instructions"].cast<int>()), of_sweep["cluster"].cast<int>(),
                  reinterpret_cast<void*>(stream));
}

void gather_columns(uintptr_t dz, int dz_element, int64_t tokens, int64_t vocabulary, uintptr_t columns, uintptr_t weights, uintptr_t divisor,
                    int64_t kept, uintptr_t out, int out_element, int threads, int device, uintptr_t stream) {
  dk::cuda::use_device(device);
  dk::cuda::gather_columns(
      {reinterpret_cast<const void*>(dz), static_cast<dk::Element>(dz_element), tokens, vocabulary, reinterpret_cast<const int64_t*>(columns),
       reinterpret_cast<const float*>(weights), reinterpret_cast<const float*>(divisor), kept, reinterpret_cast<void*>(out),
       static_cast<dk::Element>(out_element)},
      threads, reinterpret_cast<void*>(stream));
}

void gather_rows(uintptr_t matrix, int64_t stride, uintptr_t places, int64_t count, int64_t bytes, uintptr_t out, int threads, int device,
                 uintptr_t stream) {
  dk::cuda::use_device(device);
  dk::cuda::gather_rows(reinterpret_cast<const void*>(matrix), stride, reinterpret_cast<const int64_t*>(places), count, bytes,
                        reinterpret_cast<void*>(out), threads, reinterpret_cast<void*>(stream));
}

void scatter_rows(uintptr_t matrix, uintptr_t places, int64_t count, int64_t dim, uintptr_t rows, int threads, int device, uintptr_t stream) {
  dk::cuda::use_device(device);
  dk::cuda::scatter_rows(reinterpret_cast<float*>(matrix), reinterpret_cast<const int64_t*>(places), count, dim,
                         reinterpret_cast<const float*>(rows), threads, reinterpret_cast<void*>(stream));
}

py::dict limits(int device) {
  const dk::cuda::Limits limits = dk::cuda::limits_of(device);
  py::dict as;
  as["capability"] = limits.capability;
  as["multiprocessors"] = limits.multiprocessors;
  as["shared_bytes"] = limits.shared_bytes;
  as["cluster"] = limits.cluster;
  as["threads"] = limits.threads;
  return as;
}

}  // namespace

PYBIND11_MODULE(DK_MODULE, m) {
  m.doc() = "CUDA kernels of distill_kernels; called by distill_kernels.backends.cuda.";
  m.def("rows", &rows, py::arg("loss"), py::arg("rows"), py::arg("divergence"), py::arg("parameters"), py::arg("device"), py::arg("stream"));
  m.def("sweep", &sweep, py::arg("loss"), py::arg("sweep"), py::arg("divergence"), py::arg("parameters"), py::arg("device"), py::arg("stream"));
  m.def("sweep_token_bytes", &dk::cuda::sweep_token_bytes, py::arg("splits"));
  m.def(
      "sweep_shared_bytes",
      [](int instructions, bool totals) { return dk::cuda::sweep_shared_bytes(static_cast<dk::cuda::Instructions>(instructions), totals); },
      py::arg("instructions"), py::arg("totals"));
  m.attr("sweep_rows") = dk::cuda::kSweepRows;
  m.attr("sweep_entries") = dk::cuda::kSweepEntries;
  m.def("gather_columns", &gather_columns, py::arg("dz"), py::arg("dz_element"), py::arg("tokens"), py::arg("vocabulary"), py::arg("columns"),
        py::arg("weights"), py::arg("divisor"), py::arg("kept"), py::arg("out"), py::arg("out_element"), py::arg("threads"), py::arg("device"),
        py::arg("stream"));
  m.def("gather_rows", &gather_rows, py::arg("matrix"), py::arg("stride"), py::arg("places"), py::arg("count"), py::arg("bytes"), py::arg("out"),
        py::arg("threads"), py::arg("device"), py::arg("stream"));
  m.def("scatter_rows", &scatter_rows, py::arg("matrix"), py::arg("places"), py::arg("count"), py::arg("dim"), py::arg("rows"), py::arg("threads"),
        py::arg("device"), py::arg("stream"));
  m.def("limits", &limits, py::arg("device"));
  m.def("why_no_device", &dk::cuda::why_no_device);
#define DK_NAME(name) #name,
  m.attr("divergences") = std::vector<std::string>{DK_FOR_EACH_DIVERGENCE(DK_NAME)};
#undef DK_NAME
  m.attr("board_bytes") = dk::cuda::kRowBoardBytes;
  m.attr("edge_bytes") = dk::cuda::kRowEdgeBytes;
#ifdef DK_EMULATED
  m.attr("emulated") = true;
  m.def("schedule", &emulation::schedule, py::arg("seed"));
  m.def("take_traffic", [] {
    const emulation::Traffic bytes = emulation::traffic();
    emulation::traffic() = {};
    return std::pair(bytes.read, bytes.written);
  });
#else
  m.attr("emulated") = false;
#endif
}
