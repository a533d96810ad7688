// The sweep by wgmma and the copy engine, for sm_90a alone.
//
// One thread copies, two groups of four warps multiply 64 tokens each. Tiles of hidden states and head, kDepth along the dimension, go
// through a ring of kStages in shared memory, each stage with two barriers: `full` ends a phase when its bytes are there, `empty` when all
// who multiply have read it. The blocks of a cluster own neighbouring tokens and one split: each copies its share of a head's tile to all
// of them, so a stage is empty when all warps of the cluster have read it.
//
// The group of warps that the copying thread is of keeps 40 registers a thread, the others get 232: 64 logits of each model, and what the
// sums take. Both models' products of a tile come one after the other; while a group sums, the ring fills.
#include "sweep.cuh"
#include "sweep_launch.h"
#include "tma.cuh"
#include "wgmma.cuh"

namespace distill_kernels::cuda {
namespace {

constexpr int kDepth = kBoxElements, kStages = 6, kRowBytes = kDepth * 2;
constexpr int kHiddenBytes = kSweepRows * kRowBytes, kHeadBytes = kSweepEntries * kRowBytes, kStageBytes = kHiddenBytes + kHeadBytes;
using WgmmaParts = Parts<8, 1, 1, kWgmmaFragments>;
constexpr int kGroup = 128;  // threads that multiply together
constexpr int kThreads = WgmmaParts::kThreads + kGroup;
constexpr int kCopyingRegisters = 40, kMultiplyingRegisters = 232;
static_assert(kCopyingRegisters * kGroup + kMultiplyingRegisters * WgmmaParts::kThreads <= 65536, "a multiprocessor has as many");
static_assert(kWgmmaColumns == kSweepEntries && kWgmmaRows * WgmmaParts::kThreads / kGroup == kSweepRows, "the groups make a tile");

struct Maps {
  TensorMap hidden, weight;
};

// Where in the ring a thread is. A phase of parity `parity` ends when the stage is full for this round.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  DK_DEVICE void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

struct Ring {
  unsigned char* stages;
  Barrier *full, *empty;  // (kStages)

  DK_DEVICE unsigned char* hidden(int stage) const { return stages + stage * kStageBytes; }
  DK_DEVICE unsigned char* head(int stage) const { return hidden(stage) + kHiddenBytes; }
  DK_DEVICE void make(unsigned cluster) const {
    for (int stage = 0; stage < kStages; ++stage) {
      make_barrier(full + stage, 1);
      make_barrier(empty + stage, cluster * (WgmmaParts::kThreads / 32));
    }
    publish_barriers();
  }
};

// By one thread: all tiles of the block's split, as long as others multiply.
DK_DEVICE void copy_tiles(const Sweep& sweep, const Maps& student, const Maps& teacher, const Ring& ring, const Place& place) {
  const unsigned cluster = cluster_size(), rank = cluster_rank();
  const int share = kSweepEntries / cluster;
  Turn turn;
  const auto copy = [&](const Maps& maps, int dim, int at) {
    for (int k = 0; k < dim; k += kDepth) {
      wait_for_phase(ring.empty + turn.stage, turn.parity ^ 1);
      Barrier* const full = ring.full + turn.stage;
      arrive_and_expect(full, kStageBytes);
      copy_box(ring.hidden(turn.stage), &maps.hidden, k, int(place.first_token), full);
      unsigned char* const head = ring.head(turn.stage) + rank * share * kRowBytes;
      if (cluster > 1) {
        copy_box_to_all(head, &maps.weight, k, at + rank * share, full, uint16_t((1u << cluster) - 1));
      } else {
        copy_box(head, &maps.weight, k, at, full);
      }
      turn.advance();
    }
  };
  for (int at = place.begin; at < place.end; at += kSweepEntries) {
    copy(student, sweep.student.dim, at);
    if (sweep.loss.has_teacher) copy(teacher, sweep.teacher.dim, at);
  }
}

struct WgmmaProducts {
  const Ring& ring;
  int thread;
  unsigned cluster;
  Turn turn;

  // The warp has read a stage: one lane for each block of the cluster says so there.
  DK_DEVICE void release(int stage) const {
    if (unsigned(thread % 32) < cluster) arrive_at(ring.empty + stage, thread % 32);
  }

  template <Element ELEMENT>
  DK_DEVICE void multiply_all(int dim, Fragment (&sums)[kWgmmaFragments]) {
    int before = -1;
    for (int k = 0; k < dim; k += kDepth) {
      wait_for_phase(ring.full + turn.stage, turn.parity);
      const uint64_t a = tile_descriptor(ring.hidden(turn.stage) + thread / kGroup * kWgmmaRows * kRowBytes);
      const uint64_t b = tile_descriptor(ring.head(turn.stage));
      fence_sums();
#pragma unroll
      for (int part = 0; part < kDepth; part += kWgmmaDepth) multiply_tiles<ELEMENT>(sums, a + part / 8, b + part / 8, k + part > 0);
      commit_products();
      wait_for_products<1>();  // those of the stage before have read it
      if (before >= 0) release(before);
      before = turn.stage;
      turn.advance();
    }
    wait_for_products<0>();
    hold(sums);
    release(before);
  }

  DK_DEVICE void multiply(const Multiplied& model, WgmmaParts::Logits& sums) {
    if (model.hidden.element == Element::kBfloat16) {
      multiply_all<Element::kBfloat16>(model.dim, sums[0]);
    } else {
      multiply_all<Element::kFloat16>(model.dim, sums[0]);
    }
  }
};

template <template <class> class Takes, class Divergence>
__global__ void __launch_bounds__(kThreads, 1)
    sweep_wgmma(const __grid_constant__ Sweep sweep, const __grid_constant__ Maps student, const __grid_constant__ Maps teacher,
                const Divergence divergence) {
#if defined(DK_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  DK_SHARED(shared);
  const Takes<Divergence> takes{sweep, divergence};
  const Place place = place_of_block(sweep);
  const unsigned cluster = cluster_size();
  if (!wanted(takes, place.first_token - int64_t(cluster_rank()) * kSweepRows, cluster * kSweepRows)) return;
  const int thread = threadIdx.x;
  Barrier* const barriers = reinterpret_cast<Barrier*>(shared + kStages * kStageBytes);
  const Ring ring{shared, barriers, barriers + kStages};
  const OwnSums<WgmmaParts, typename Takes<Divergence>::Kept> own{reinterpret_cast<float*>(barriers + 2 * kStages)};
  if (thread == 0) ring.make(cluster);
  cluster_arrive();
  cluster_wait();
  if (thread >= WgmmaParts::kThreads) {
    fewer_registers<kCopyingRegisters>();
    if (thread == WgmmaParts::kThreads) copy_tiles(sweep, student, teacher, ring, place);
  } else {
    more_registers<kMultiplyingRegisters>();
    WgmmaProducts products{ring, thread, cluster, {}};
    sweep_tiles<WgmmaParts>(takes, products, own, place, thread);
    barrier_of_threads<WgmmaParts::kThreads>();
    write_sums<WgmmaParts>(takes, own, place, thread);
  }
  cluster_arrive();  // no block ends while another still arrives at its barriers
  cluster_wait();
#else
  __trap();  // machine code of another chip, for which this is not to be launched
#endif
}

}  // namespace

size_t wgmma_shared_bytes(bool totals) {
  return kStages * (kStageBytes + 2 * sizeof(Barrier)) +
         (totals ? OwnSums<WgmmaParts, SweptTotals>::kBytes : OwnSums<WgmmaParts, SweptStatistics>::kBytes);
}

template <template <class> class Takes, class Divergence>
void launch_wgmma(const Sweep& sweep, const Divergence& divergence, int cluster, void* stream) {
  const auto maps = [&](const Multiplied& model) {
    Maps both{};
    if (model.dim == 0) return both;
    both.hidden = make_tensor_map(model.hidden, sweep.loss.tokens, model.dim, kSweepRows);
    both.weight = make_tensor_map(model.weight, sweep.loss.vocabulary, model.dim, kSweepEntries / cluster);
    return both;
  };
  const int64_t blocks = (sweep.loss.tokens + kSweepRows * cluster - 1) / (kSweepRows * cluster) * cluster;
  const dim3 grid(unsigned(blocks * sweep.splits));
  launch(sweep_wgmma<Takes, Divergence>, grid, cluster, dim3(kThreads), wgmma_shared_bytes(!Takes<Divergence>::kAll), stream, sweep,
         maps(sweep.student), maps(sweep.teacher), divergence);
}

#define DK_LAUNCHES(DIVERGENCE)                                                                                 \
  template void launch_wgmma<TakesStatistics, DIVERGENCE>(const Sweep&, const DIVERGENCE&, int, void*); \
  template void launch_wgmma<TakesTotals, DIVERGENCE>(const Sweep&, const DIVERGENCE&, int, void*);
DK_FOR_EACH_SWEPT(DK_LAUNCHES)

}  // namespace distill_kernels::cuda
