// Chooses the instruction set at run time. Nothing of the standard library is instantiated in the files compiled for one: the
// linker could keep the AVX-512 copy of a shared template for every processor.
#include "chunk.h"

#include <chrono>
#include <cstring>
#include <iterator>

namespace distill_kernels {

namespace {

struct InstructionSet {
  const char* name;
  void (*run)(const ChunkParams&, Stage, int threads, float* memory);
  int64_t (*scratch_floats)(const ChunkParams&, int threads);
  void (*quantise)(const Matrix&, int64_t, int64_t, int8_t*, float*, int threads, float* memory);
  void (*map)(char, const float*, float*, int64_t);
  void (*multiply)(const float*, const float*, float*, int64_t, int64_t);
  double (*multiply_adds)(int64_t, float*);
};

}  // namespace

#define DK_DECLARE(isa)                                                        \
  namespace isa {                                                              \
  void run(const ChunkParams&, Stage, int threads, float* memory);             \
  int64_t scratch_floats(const ChunkParams&, int threads);                     \
  void quantise(const Matrix&, int64_t, int64_t, int8_t*, float*, int, float*); \
  void map(char, const float*, float*, int64_t);                               \
  void multiply(const float*, const float*, float*, int64_t, int64_t);         \
  double multiply_adds(int64_t, float*);                                       \
  constexpr InstructionSet set{#isa, &run, &scratch_floats, &quantise, &map, &multiply, &multiply_adds}; \
  }
DK_DECLARE(baseline)
#if defined(__x86_64__)
DK_DECLARE(avx2)
DK_DECLARE(avx512)
DK_DECLARE(avx512vnni)
#if __has_include(<avx512bf16intrin.h>)
#define DK_HAS_AVX512BF16
DK_DECLARE(avx512bf16)
#endif
#endif
#undef DK_DECLARE

namespace {

bool everywhere() { return true; }
#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw");
}
bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#if defined(DK_HAS_AVX512BF16)
bool has_avx512bf16() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif

// Those of this build, the one to prefer first, and where each of them runs.
struct Candidate {
  InstructionSet set;
  bool (*runs_here)();
};
constexpr Candidate kCandidates[] = {
#if defined(DK_HAS_AVX512BF16)
    {avx512bf16::set, &has_avx512bf16},
#endif
#if defined(__x86_64__)
    {avx512vnni::set, &has_avx512vnni},
    {avx512::set, &has_avx512},
    {avx2::set, &has_avx2},
#endif
    {baseline::set, &everywhere},
};

struct Available {
  const InstructionSet* sets[std::size(kCandidates)] = {};
  const char* names[std::size(kCandidates) + 1] = {};  // ended by null
  int count = 0;
};

const Available& available() {
  static const Available found = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    Available a;
    for (const Candidate& candidate : kCandidates)
      if (candidate.runs_here()) {
        a.names[a.count] = candidate.set.name;
        a.sets[a.count++] = &candidate.set;
      }
    return a;
  }();
  return found;
}

const InstructionSet* find(const char* name) {
  const Available& a = available();
  if (name == nullptr) return a.sets[0];
  for (int i = 0; i < a.count; ++i)
    if (std::strcmp(a.names[i], name) == 0) return a.sets[i];
  return nullptr;
}

}  // namespace

const char* const* available_instruction_sets() { return available().names; }

int64_t chunk_scratch_floats(const ChunkParams& params, int threads, const char* instruction_set) {
  const InstructionSet* set = find(instruction_set);
  return set == nullptr ? -1 : set->scratch_floats(params, threads);
}

bool run_chunk(const ChunkParams& params, Stage stage, int threads, float* scratch, const char* instruction_set) {
  const InstructionSet* set = find(instruction_set);
  if (set == nullptr) return false;
  set->run(params, stage, threads, scratch);
  return true;
}

bool quantise_rows(const Matrix& from, int64_t rows, int64_t dim, int8_t* out, float* scales, int threads, float* scratch,
                   const char* instruction_set) {
  const InstructionSet* set = find(instruction_set);
  if (set == nullptr) return false;
  set->quantise(from, rows, dim, out, scales, threads, scratch);
  return true;
}

bool run_math_function(char which, const float* in, float* out, int64_t count, const char* instruction_set) {
  const InstructionSet* set = find(instruction_set);
  if (set == nullptr) return false;
  set->map(which, in, out, count);
  return true;
}

bool run_multiply(const float* a, const float* b, float* c, int64_t rows, int64_t depth, const char* instruction_set) {
  const InstructionSet* set = find(instruction_set);
  if (set == nullptr) return false;
  set->multiply(a, b, c, rows, depth);
  return true;
}

double multiply_add_rate(int64_t count, const char* instruction_set) {
  const InstructionSet* set = find(instruction_set);
  if (set == nullptr) return -1.0;
  float sink = 1e-3f;
  const auto begin = std::chrono::steady_clock::now();
  const double operations = set->multiply_adds(count, &sink);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return sink == 0.0f ? 0.0 : operations / seconds;
}

}  // namespace distill_kernels
