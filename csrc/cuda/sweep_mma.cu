// The sweep by mma.sync, for sm_80 and every later chip (on sm_100 too, whose own tcgen05 is not used).
//
// All warps copy, multiply and sum. Tiles of hidden states and head, kDepth along the dimension, go through a ring of kStages in shared
// memory: while one is multiplied the next are under way, on into the teacher's product and the next tile of the vocabulary. 49,152 bytes
// of it, and 45,056 of sums, fit the 99 KiB of chips 8.6, 8.9 and 12.x, too. 128 x 128 is the most that both models' logits, 64 of each a
// thread, and the operands leave registers for.
#include "sweep.cuh"
#include "sweep_launch.h"

namespace distill_kernels::cuda {
namespace {

constexpr int kDepth = 32, kStages = 3, kPart = 8;  // elements of 16 bytes
constexpr int kPartsOfRow = kDepth / kPart, kRowBytes = kDepth * 2;
constexpr int kHiddenBytes = kSweepRows * kRowBytes, kStageBytes = kHiddenBytes + kSweepEntries * kRowBytes;
using MmaParts = Parts<4, 2, 2, 8>;

// Where the 16 bytes of a row's part lie in a tile: of any eight neighbouring rows, the same part in different banks.
DK_DEVICE int swizzled(int row, int part) { return row * kRowBytes + (part ^ (row / 2 % kPartsOfRow)) * 16; }

// What is copied next: a stage of a model's product for a tile of the vocabulary.
struct Cursor {
  int at, k;
  bool teacher;
};

struct MmaProducts {
  const Sweep& sweep;
  const Place& place;
  unsigned char* ring;
  int thread;
  Cursor next;
  int written = 0, read = 0;  // stages

  DK_DEVICE MmaProducts(const Sweep& sweep_, const Place& place_, unsigned char* ring_, int thread_)
      : sweep(sweep_), place(place_), ring(ring_), thread(thread_), next{place_.begin, 0, false} {
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) copy_next();
  }

  template <int ROWS>
  DK_DEVICE void copy(const Matrix& matrix, int64_t first_row, int64_t rows, int dim, unsigned char* to) const {
    static_assert(ROWS * kPartsOfRow % MmaParts::kThreads == 0, "all threads copy as much");
#pragma unroll
    for (int i = 0; i < ROWS * kPartsOfRow / MmaParts::kThreads; ++i) {
      const int id = thread + i * MmaParts::kThreads, row = id / kPartsOfRow, part = id % kPartsOfRow, k = next.k + part * kPart;
      const bool inside = first_row + row < rows && k < dim;
      const auto* from = static_cast<const uint16_t*>(matrix.data) + (inside ? (first_row + row) * matrix.stride + k : 0);
      copy_async(to + swizzled(row, part), from, inside);
    }
  }

  // A group for every stage, with nothing in it after the last: so how many are under way is known when compiling.
  DK_DEVICE void copy_next() {
    if (next.at < place.end) {
      const Multiplied& model = next.teacher ? sweep.teacher : sweep.student;
      unsigned char* const stage = ring + written * kStageBytes;
      copy<kSweepRows>(model.hidden, place.first_token, sweep.loss.tokens, model.dim, stage);
      copy<kSweepEntries>(model.weight, next.at, sweep.loss.vocabulary, model.dim, stage + kHiddenBytes);
      next.k += kDepth;
      if (next.k >= model.dim) {
        next.k = 0;
        if (next.teacher || !sweep.loss.has_teacher) next.at += kSweepEntries;
        next.teacher = !next.teacher && sweep.loss.has_teacher;
      }
      written = written + 1 == kStages ? 0 : written + 1;
    }
    commit_copies();
  }

  template <Element ELEMENT>
  DK_DEVICE void multiply_stage(MmaParts::Logits& sums) const {
    const unsigned char *hidden = ring + read * kStageBytes, *head = hidden + kHiddenBytes;
    const int lane = thread % 32, row = MmaParts::first_row(thread), entry = MmaParts::first_entry(thread);
#pragma unroll
    for (int part = 0; part < kPartsOfRow; part += 2) {
      uint32_t a[MmaParts::kFragmentsDown][4], b[MmaParts::kFragmentsAcross / 2][2][2];
#pragma unroll
      for (int m = 0; m < MmaParts::kFragmentsDown; ++m) load_matrices(a[m], hidden + swizzled(row + 16 * m + lane % 16, part + lane / 16));
#pragma unroll
      for (int n = 0; n < MmaParts::kFragmentsAcross / 2; ++n) {
        uint32_t both[4];
        load_matrices(both, head + swizzled(entry + 16 * n + lane / 16 * 8 + lane % 8, part + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < 4; ++i) b[n][i / 2][i % 2] = both[i];
      }
#pragma unroll
      for (int m = 0; m < MmaParts::kFragmentsDown; ++m)
#pragma unroll
        for (int n = 0; n < MmaParts::kFragmentsAcross; ++n) multiply_add<ELEMENT>(sums[m][n], a[m], b[n / 2][n % 2]);
    }
  }

  template <Element ELEMENT>
  DK_DEVICE void multiply_all(int dim, MmaParts::Logits& sums) {
    for (int k = 0; k < dim; k += kDepth) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // the stage is there for all, and all have read the one that is written next
      copy_next();
      multiply_stage<ELEMENT>(sums);
      read = read + 1 == kStages ? 0 : read + 1;
    }
  }

  DK_DEVICE void multiply(const Multiplied& model, MmaParts::Logits& sums) {
#pragma unroll
    for (auto& row : sums)
#pragma unroll
      for (auto& fragment : row)
#pragma unroll
        for (float& sum : fragment) sum = 0.0f;
    if (model.hidden.element == Element::kBfloat16) {
      multiply_all<Element::kBfloat16>(model.dim, sums);
    } else {
      multiply_all<Element::kFloat16>(model.dim, sums);
    }
  }
};

template <template <class> class Takes, class Divergence>
__global__ void __launch_bounds__(MmaParts::kThreads, 1) sweep_mma(const __grid_constant__ Sweep sweep, const Divergence divergence) {
  DK_SHARED(shared);
  const Takes<Divergence> takes{sweep, divergence};
  const Place place = place_of_block(sweep);
  if (!wanted(takes, place.first_token, kSweepRows)) return;
  const int thread = threadIdx.x;
  const OwnSums<MmaParts, typename Takes<Divergence>::Kept> own{reinterpret_cast<float*>(shared + kStages * kStageBytes)};
  MmaProducts products(sweep, place, shared, thread);
  sweep_tiles<MmaParts>(takes, products, own, place, thread);
  __syncthreads();
  write_sums<MmaParts>(takes, own, place, thread);
}

}  // namespace

size_t mma_shared_bytes(bool totals) {
  return kStages * kStageBytes + (totals ? OwnSums<MmaParts, SweptTotals>::kBytes : OwnSums<MmaParts, SweptStatistics>::kBytes);
}

template <template <class> class Takes, class Divergence>
void launch_mma(const Sweep& sweep, const Divergence& divergence, void* stream) {
  const int64_t blocks = (sweep.loss.tokens + kSweepRows - 1) / kSweepRows;
  const dim3 grid(unsigned(blocks * sweep.splits));
  launch(sweep_mma<Takes, Divergence>, grid, 1, dim3(MmaParts::kThreads), mma_shared_bytes(!Takes<Divergence>::kAll), stream, sweep, divergence);
}

#define DK_LAUNCHES(DIVERGENCE)                                                                          \
  template void launch_mma<TakesStatistics, DIVERGENCE>(const Sweep&, const DIVERGENCE&, void*); \
  template void launch_mma<TakesTotals, DIVERGENCE>(const Sweep&, const DIVERGENCE&, void*);
DK_FOR_EACH_SWEPT(DK_LAUNCHES)

}  // namespace distill_kernels::cuda
