// Runs the row kernel and the kernels of sampled columns on random problems under several schedules: rows_driver RESULTS SEED...
//
// What the first schedule makes goes to the file RESULTS, as float; one whose bits differ is an error, for order in time must not matter.
// Every array lies in memory of its own size, so that a sanitizer sees an access beyond it.
#include <cstdio>
#include <fstream>
#include <memory>
#include <random>
#include <vector>

#include "cuda/columns.h"
#include "cuda/rows.h"
#include "cuda_emulation.h"

namespace dk = distill_kernels;
namespace distill_kernels::cuda {
struct forward_kl;
struct alpha_beta;
struct no_divergence;
}  // namespace distill_kernels::cuda

namespace {

std::mt19937 generator(1);
std::vector<float> results;

template <class T>
struct Array {
  std::unique_ptr<T[]> data;
  size_t count;
  explicit Array(size_t count_) : data(new T[count_]), count(count_) {}
  T* get() const { return data.get(); }
  void poison() const { memset(static_cast<void*>(data.get()), 0xff, count * sizeof(T)); }
};

Array<float> normal(size_t count, float deviation) {
  Array<float> made(count);
  std::normal_distribution<float> numbers(0.0f, deviation);
  for (size_t i = 0; i < count; ++i) made.get()[i] = numbers(generator);
  return made;
}

void append(std::vector<float>& to, const Array<float>& from) { to.insert(to.end(), from.get(), from.get() + from.count); }

// 16-bit numbers of one kind or the other, or the halves of float32.
void append(std::vector<float>& to, const Array<uint16_t>& from, dk::Element element) {
  for (size_t i = 0; i < from.count; ++i)
    to.push_back(element == dk::Element::kBfloat16  ? __bfloat162float({from.get()[i]})
                 : element == dk::Element::kFloat16 ? __half2float({from.get()[i]})
                                                    : float(from.get()[i]));
}

void keep(bool first, const std::vector<float>& made) {
  if (first) results.insert(results.end(), made.begin(), made.end());
  else if (memcmp(&*(results.end() - made.size()), made.data(), made.size() * sizeof(float)) != 0)
    throw std::runtime_error("bits differ from one schedule to another");
}

struct Case {
  int tokens, vocabulary;
  unsigned cluster, threads;
  bool holds, teacher, everything;
  float floor, teacher_deviation;  // which tokens have entries below the floor, and of which softmax
  float inverse_temperature;
  dk::Element dz;
  decltype(&dk::cuda::launch_rows<dk::cuda::forward_kl>) launch;
  bool tied = false;  // two entries of the student's are the largest, of which the teacher's largest is the first; no bias
};

void rows(const Case& c, const std::vector<unsigned>& seeds) {
  const size_t logits = size_t(c.tokens) * c.vocabulary;
  const Array<float> student = normal(logits, 3.0f), teacher = normal(logits, c.teacher_deviation), bias = normal(c.vocabulary, 1.0f);
  const Array<float> coefficients(c.tokens * dk::kTerms), terms(c.tokens * dk::kTerms), stats(c.tokens * dk::kStats), in_place(logits);
  const Array<float> scale(1);
  const Array<uint16_t> narrow(logits);
  const Array<int64_t> labels(c.tokens);
  *scale.get() = 0.5f;
  if (c.tied) {
    for (int n = 0; n < c.tokens; ++n) {
      float* const of_student = student.get() + size_t(n) * c.vocabulary;
      of_student[15] = of_student[c.vocabulary - 2] = teacher.get()[size_t(n) * c.vocabulary + 15] = 30.0f;
    }
  }
  for (int n = 0; n < c.tokens; ++n) {
    labels.get()[n] = n % 3 == 1 ? -1 : generator() % c.vocabulary;
    for (int i = 0; i < dk::kTerms; ++i) coefficients.get()[n * dk::kTerms + i] = n % 4 == 2 ? 0.0f : 0.1f * float(i + 1);
  }
  dk::cuda::Loss loss{};
  loss.tokens = c.tokens;
  loss.vocabulary = c.vocabulary;
  loss.student = {c.everything && !c.tied ? bias.get() : nullptr, 1.0f, c.everything ? 20.0f : 0.0f};
  loss.teacher = {nullptr, 1.0f, 0.0f};
  loss.labels = c.everything ? labels.get() : nullptr;
  loss.coefficients = coefficients.get();
  loss.terms = terms.get();
  loss.stats = c.everything ? stats.get() : nullptr;
  loss.inverse_temperature = c.inverse_temperature;
  loss.label_smoothing = 0.1f;
  loss.floor = c.floor;
  loss.tail_probability = 1e-4f;
  loss.has_teacher = c.teacher;
  loss.untempered = loss.separate = loss.smoothing = c.everything;
  const bool wide = c.dz == dk::Element::kFloat32;
  const int vectors = c.vocabulary / 4 + 1, held = (vectors + int(c.cluster) - 1) / int(c.cluster);
  const dk::cuda::Rows rows{in_place.get(), c.teacher ? teacher.get() : nullptr, wide ? static_cast<void*>(in_place.get()) : narrow.get(),
                            c.dz,           wide ? nullptr : scale.get(),        c.holds ? held : 0};
  const float parameters[dk::kMaxParameters] = {0.2f, 0.7f};
  for (unsigned seed : seeds) {
    emulation::schedule(seed);
    memcpy(in_place.get(), student.get(), logits * sizeof(float));
    narrow.poison();
    terms.poison();
    stats.poison();
    c.launch(loss, rows, {c.cluster, c.threads}, parameters, nullptr);
    std::vector<float> made;
    append(made, terms);
    if (loss.stats != nullptr) append(made, stats);
    if (wide) append(made, in_place);
    else append(made, narrow, c.dz);
    keep(seed == seeds[0], made);
  }
}

// `moved` of the kept columns have their rows gathered and scattered: a block each, and a race detector has few threads.
void columns(int tokens, int vocabulary, int kept, int moved, int dim, dk::Element element, const std::vector<unsigned>& seeds) {
  const Array<float> dz = normal(size_t(tokens) * vocabulary, 1.0f), weights = normal(kept, 1.0f), rows = normal(size_t(moved) * dim, 1.0f);
  const Array<float> start = normal(size_t(vocabulary) * dim, 1.0f), d_weight(size_t(vocabulary) * dim), gathered(size_t(moved) * dim);
  const Array<uint16_t> out(size_t(tokens) * kept);
  const Array<int64_t> places(kept);
  const Array<float> divisor(1);
  *divisor.get() = 0.25f;
  for (int i = 0; i < kept; ++i) places.get()[i] = int64_t(i) * vocabulary / kept;
  for (unsigned seed : seeds) {
    emulation::schedule(seed);
    out.poison();
    gathered.poison();
    memcpy(d_weight.get(), start.get(), start.count * sizeof(float));
    const dk::cuda::GatherColumns gather{dz.get(),      dk::Element::kFloat32, tokens,    vocabulary, places.get(),
                                         weights.get(), divisor.get(),         kept, out.get(), element};
    dk::cuda::gather_columns(gather, 64, nullptr);
    dk::cuda::gather_rows(start.get(), dim * 4, places.get(), moved, dim * 4, gathered.get(), 64, nullptr);
    dk::cuda::scatter_rows(d_weight.get(), places.get(), moved, dim, rows.get(), 64, nullptr);
    std::vector<float> made;
    append(made, out, element);
    append(made, gathered);
    append(made, d_weight);
    keep(seed == seeds[0], made);
  }
}

}  // namespace

int main(int count, char** arguments) try {
  std::vector<unsigned> seeds;
  for (int i = 2; i < count; ++i) seeds.push_back(unsigned(std::stoul(arguments[i])));
  constexpr auto kForward = &dk::cuda::launch_rows<dk::cuda::forward_kl>;
  constexpr auto kThreePasses = &dk::cuda::launch_rows<dk::cuda::alpha_beta>;
  constexpr auto kNone = &dk::cuda::launch_rows<dk::cuda::no_divergence>;
  using dk::Element;
  const Case cases[] = {
      {5, 301, 1, 64, true, true, true, -16.0f, 3.0f, 0.5f, Element::kFloat32, kForward},  // the untempered softmax alone passes the floor
      {5, 301, 1, 64, false, true, false, -1e4f, 3.0f, 0.5f, Element::kFloat32, kForward},
      {5, 301, 2, 32, true, true, false, -14.0f, 9.0f, 0.5f, Element::kFloat32, kForward},  // the teacher's alone
      {5, 1023, 4, 32, true, true, true, -8.0f, 3.0f, 0.5f, Element::kBfloat16, kThreePasses},
      {4, 515, 2, 64, false, true, false, -1e4f, 3.0f, 0.5f, Element::kFloat32, kThreePasses},
      {5, 66, 8, 32, true, true, false, -1e4f, 3.0f, 2.0f, Element::kFloat16, kForward},  // threads without an entry, and cold
      {6, 3, 1, 32, true, true, true, -1e4f, 3.0f, 0.5f, Element::kFloat32, kForward},
      {5, 130, 2, 32, true, false, true, -1e4f, 3.0f, 0.5f, Element::kFloat16, kNone},
      // The second token's last entries but two are of no whole vector, and of the thread that has entry 15, which takes them first.
      {2, 301, 1, 64, true, true, true, -1e4f, 3.0f, 0.5f, Element::kFloat32, kForward, true},
  };
  for (const Case& c : cases)
    rows(c, seeds);
  columns(3, 97, 40, 40, 12, Element::kFloat16, seeds);
  columns(1, 4300, 2100, 20, 1, Element::kBfloat16, seeds);
  std::ofstream(arguments[1], std::ios::binary).write(reinterpret_cast<const char*>(results.data()), results.size() * sizeof(float));
  printf("%llu switches\n", static_cast<unsigned long long>(emulation::switches()));
  return 0;
} catch (const std::exception& error) {
  fprintf(stderr, "refused: %s\n", error.what());
  return 3;
}
