// Runs the tile-fused sweep of a problem in a file under several schedules: sweep_driver PROBLEM TERMS INSTRUCTIONS CLUSTER SEED...
//
// The terms of the first schedule go to the file TERMS; a later one whose bits differ is an error, for order in time must not matter.
// Prints the bytes that kernels asked of global memory. Every array lies in memory of its own, so that a sanitizer sees a read beyond it.
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include <cuda/sweep.h>
#include <cuda_emulation.h>

namespace dk = distill_kernels;

namespace {

struct Numbers {
  int64_t tokens, vocabulary, student_dim, teacher_dim, student_element, teacher_element, student_hidden_stride, student_weight_stride;
  int64_t teacher_hidden_stride, teacher_weight_stride, divergence, splits, split_entries, untempered, separate, smoothing;
  double student_scale, teacher_scale, student_softcap, teacher_softcap, inverse_temperature, label_smoothing, floor;
};

template <class T>
struct Array {
  std::unique_ptr<T[]> data;
  explicit Array(std::ifstream& file) {
    int64_t count = 0;
    file.read(reinterpret_cast<char*>(&count), sizeof count);
    if (count == 0) return;
    data.reset(new T[count]);
    file.read(reinterpret_cast<char*>(data.get()), count * sizeof(T));
  }
};

}  // namespace

int main(int count, char** arguments) try {
  std::ifstream file(arguments[1], std::ios::binary);
  Numbers n;
  file.read(reinterpret_cast<char*>(&n), sizeof n);
  const Array<uint16_t> student_hidden(file), student_weight(file), teacher_hidden(file), teacher_weight(file);
  const Array<float> student_bias(file), teacher_bias(file), coefficients(file);
  const Array<int64_t> labels(file);
  if (!file) throw std::runtime_error("the problem ends early");

  dk::cuda::Sweep sweep{};
  std::vector<float> terms(n.tokens * dk::kTerms), first;
  sweep.loss.tokens = n.tokens;
  sweep.loss.vocabulary = int(n.vocabulary);
  sweep.loss.student = {student_bias.data.get(), float(n.student_scale), float(n.student_softcap)};
  sweep.loss.teacher = {teacher_bias.data.get(), float(n.teacher_scale), float(n.teacher_softcap)};
  sweep.loss.labels = labels.data.get();
  sweep.loss.coefficients = coefficients.data.get();
  sweep.loss.inverse_temperature = float(n.inverse_temperature);
  sweep.loss.label_smoothing = float(n.label_smoothing);
  sweep.loss.floor = float(n.floor);
  sweep.loss.has_teacher = n.teacher_dim > 0;
  sweep.loss.untempered = n.untempered;
  sweep.loss.separate = n.separate;
  sweep.loss.smoothing = n.smoothing;
  const auto model = [](auto& hidden, int64_t hidden_stride, auto& weight, int64_t weight_stride, int64_t element, int64_t dim) {
    const auto of = static_cast<dk::Element>(element);
    return dk::cuda::Multiplied{{hidden.data.get(), of, hidden_stride}, {weight.data.get(), of, weight_stride}, int(dim)};
  };
  sweep.student = model(student_hidden, n.student_hidden_stride, student_weight, n.student_weight_stride, n.student_element, n.student_dim);
  sweep.teacher = model(teacher_hidden, n.teacher_hidden_stride, teacher_weight, n.teacher_weight_stride, n.teacher_element, n.teacher_dim);
  sweep.splits = int(n.splits);
  sweep.split_entries = int(n.split_entries);
  const float parameters[dk::kMaxParameters] = {};
  const auto instructions = std::string(arguments[3]) == "wgmma" ? dk::cuda::Instructions::kWgmma : dk::cuda::Instructions::kMma;
  for (int i = 5; i < count; ++i) {
    emulation::schedule(unsigned(std::stoul(arguments[i])));
    std::fill(terms.begin(), terms.end(), NAN);
    const size_t bytes = n.tokens * dk::cuda::sweep_token_bytes(sweep.splits);
    const std::unique_ptr<unsigned char[]> workspace(new unsigned char[bytes]);
    std::fill_n(workspace.get(), bytes, 0xff);
    sweep.loss.terms = terms.data();
    emulation::traffic() = {};
    dk::cuda::sweep(sweep, workspace.get(), int(n.divergence), parameters, instructions, std::stoi(arguments[4]), nullptr);
    if (i == 5) first = terms;
    if (memcmp(first.data(), terms.data(), terms.size() * sizeof(float)) != 0)
      throw std::runtime_error("bits differ from one schedule to another");
  }
  std::ofstream(arguments[2], std::ios::binary).write(reinterpret_cast<const char*>(first.data()), first.size() * sizeof(float));
  printf("%llu %llu\n", (unsigned long long)emulation::traffic().read, (unsigned long long)emulation::traffic().written);
  return 0;
} catch (const std::exception& error) {
  fprintf(stderr, "refused: %s\n", error.what());
  return 3;
}
