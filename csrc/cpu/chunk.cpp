// Chooses the instruction set at run time. Nothing of the standard library is instantiated in the files compiled for one: the
// linker could keep the AVX-512 copy of a shared template for every processor.
#include "chunk.h"

#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace distill_kernels {

#define DK_DECLARE(isa)                               \
  namespace isa {                                     \
  void run(const ChunkParams&, int, float* memory);   \
  int64_t scratch_floats(const ChunkParams&, int);           \
  void map(char, const float*, float*, int64_t);      \
  }
DK_DECLARE(baseline)
#if defined(__x86_64__)
DK_DECLARE(avx2)
DK_DECLARE(avx512)
#endif
#undef DK_DECLARE

namespace {

struct InstructionSet {
  const char* name;
  void (*run)(const ChunkParams&, int, float*);
  int64_t (*scratch_floats)(const ChunkParams&, int);
  void (*map)(char, const float*, float*, int64_t);
};

constexpr int kAtMost = 3;
struct Available {
  InstructionSet sets[kAtMost];
  const char* names[kAtMost + 1] = {};
  int count = 0;

  void add(InstructionSet set) {
    names[count] = set.name;
    sets[count++] = set;
  }
};

const Available& available() {
  static const Available found = [] {
    Available a;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
      a.add({"avx512", &avx512::run, &avx512::scratch_floats, &avx512::map});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) a.add({"avx2", &avx2::run, &avx2::scratch_floats, &avx2::map});
#endif
    a.add({"baseline", &baseline::run, &baseline::scratch_floats, &baseline::map});
    return a;
  }();
  return found;
}

const InstructionSet* find(const char* name) {
  const Available& a = available();
  if (name == nullptr) return &a.sets[0];
  for (int i = 0; i < a.count; ++i)
    if (std::strcmp(a.names[i], name) == 0) return &a.sets[i];
  return nullptr;
}

// Asks for pages of 2 MiB where memory is touched for the first time: a head's gradient would otherwise take a page fault for every
// 4 KiB, which is a tenth of the time of its products.
void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#else
  (void)data, (void)bytes;
#endif
}

void ask_for_huge_pages(const ChunkParams& p) {
  const int64_t entry = static_cast<int64_t>(sizeof(float)) * p.vocabulary;
  if (p.d_weight != nullptr) ask_for_huge_pages(p.d_weight, entry * p.student.dim);
  ask_for_huge_pages(p.student.logits, entry * p.stride);
  if (p.teacher.logits != nullptr) ask_for_huge_pages(p.teacher.logits, entry * p.stride);
}

}  // namespace

const char* const* available_instruction_sets() { return available().names; }

int64_t chunk_scratch_floats(const ChunkParams& params, int threads, const char* instruction_set) {
  const InstructionSet* set = find(instruction_set);
  return set == nullptr ? -1 : set->scratch_floats(params, threads);
}

bool run_chunk(const ChunkParams& params, int threads, float* scratch, const char* instruction_set) {
  const InstructionSet* set = find(instruction_set);
  if (set == nullptr) return false;
  if (params.first) ask_for_huge_pages(params);
  set->run(params, threads, scratch);
  return true;
}

bool run_math_function(char which, const float* in, float* out, int64_t count, const char* instruction_set) {
  const InstructionSet* set = find(instruction_set);
  if (set == nullptr) return false;
  set->map(which, in, out, count);
  return true;
}

}  // namespace distill_kernels
