// The row kernel of the chunked schedule: the logits of a chunk's tokens become loss terms, stats and dz.
//
// A cluster of blocks owns a token, each of them a slice of its vocabulary; a cluster may be a single block. Sums go over the lanes of a
// warp, the warps of a block and the blocks of the cluster, in an order of their own that no schedule changes: same bits run to run.
//
// Bytes asked of memory for each entry, 4 of each model's logit: where the cluster's shared memory holds the row, one read; elsewhere one
// to sum, one more where sums need the log-sum-exps first (`wants_totals`), and one for dz. And 4 or 2 written, where dz is wanted. A
// label, the coefficients and a bias come on top.
//
// Rows begin anywhere, vectors of 16 bytes at multiples of 4 entries of the whole matrix. What is left of a row before its first whole
// vector and after its last, six entries at most, is read and written one by one: the rest of such a vector is a neighbour's, whose dz may
// be taking its place.
#pragma once

#include <type_traits>

#include "rows.h"
#include "statistics.cuh"

namespace distill_kernels::cuda {

constexpr int kEntries = 4;    // of a vector of 16 bytes
constexpr int kMostEdges = 2 * (kEntries - 1);
constexpr int kMostWarps = kMostRowThreads / 32;

// Where the sums of a cluster's threads meet.
template <class Sums>
struct Board {
  Sums of_warp[kMostWarps], of_block, of_row;
};
struct Boards {
  Board<Statistics> statistics;
  Board<Totals> totals;
};
static_assert(sizeof(Boards) <= kRowBoardBytes && kRowBoardBytes % 16 == 0, "boards lie before the logits that a block holds");

template <class Sums, class Merge>
DK_DEVICE Sums over_lanes(Sums sums, Merge merge) {
#pragma unroll 1
  for (int lanes = 16; lanes > 0; lanes /= 2) merge(sums, shuffle_xor(sums, lanes));
  return sums;
}

// The sums of all threads of the cluster, in each of them.
template <class Sums, class Merge>
DK_DEVICE Sums over_row(Sums sums, const Sums& none, Board<Sums>& board, Merge merge) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  sums = over_lanes(sums, merge);
  if (lane == 0) board.of_warp[warp] = sums;
  __syncthreads();
  if (warp == 0) {
    sums = over_lanes(lane < blockDim.x / 32 ? board.of_warp[lane] : none, merge);
    if (lane == 0) board.of_block = sums;
  }
  if (cluster_size() == 1) {
    __syncthreads();
    return board.of_block;
  }
  cluster_arrive();
  cluster_wait();
  if (warp == 0) {
    sums = over_lanes(lane < cluster_size() ? *shared_of(&board.of_block, lane) : none, merge);
    if (lane == 0) board.of_row = sums;
  }
  __syncthreads();
  return board.of_row;
}

// The part of a row that a block owns: whole vectors, and in the first block of a cluster the entries that are of none.
struct Slice {
  int64_t row;            // its first entry in the matrix
  int first, count;       // entries before the first whole vector; whole vectors of the row
  int begin, end;         // of those, the block's
  int edge;               // this thread's entry that is of none; −1: it has none

  DK_DEVICE int entry(int vector) const { return first + vector * kEntries; }
};

DK_DEVICE Slice slice_of(int64_t token, int vocabulary) {
  Slice slice;
  slice.row = token * vocabulary;
  slice.first = min(int(-slice.row & (kEntries - 1)), vocabulary);
  slice.count = (vocabulary - slice.first) / kEntries;
  const int share = (slice.count + int(cluster_size()) - 1) / int(cluster_size());
  slice.begin = min(int(cluster_rank()) * share, slice.count);
  slice.end = min(slice.begin + share, slice.count);
  const int thread = int(threadIdx.x), after = thread < slice.first ? 0 : slice.count * kEntries;
  slice.edge = cluster_rank() == 0 && thread + after < vocabulary && thread < kMostEdges ? thread + after : -1;
  return slice;
}

// Logits of a row. What a block holds lies after the boards: its slice of the student's, then of the teacher's, then the edges; each place
// is written and read by one thread alone.
struct Logits {
  const Loss& loss;
  const float *student, *teacher;  // the row's bare products
  float* held;                     // null: nothing is held
  int held_vectors;
  bool fresh;                      // nothing was held so far: logits come from global memory, and are held

  DK_DEVICE bool from_memory() const { return fresh || held == nullptr; }
  DK_DEVICE float* place(int vector) const { return held + vector * kEntries; }
  DK_DEVICE float* edges() const { return held + (loss.has_teacher ? 2 : 1) * held_vectors * kEntries; }

  // As they are where they lie: what `meant` makes logits of.
  DK_DEVICE void fetch(const Slice& slice, int vector, float4& z, float4& y) const {
    if (from_memory()) {
      z = load(reinterpret_cast<const float4*>(student + slice.entry(vector)));
      if (loss.has_teacher) y = load(reinterpret_cast<const float4*>(teacher + slice.entry(vector)));
    } else {
      z = *reinterpret_cast<const float4*>(place(vector - slice.begin));
      if (loss.has_teacher) y = *reinterpret_cast<const float4*>(place(held_vectors + vector - slice.begin));
    }
  }
  DK_DEVICE void meant(const Slice& slice, int vector, float (&z)[kEntries], float (&y)[kEntries]) const {
    if (!from_memory()) return;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      z[i] = meant_logit(z[i], loss.student, slice.entry(vector) + i);
      if (loss.has_teacher) y[i] = meant_logit(y[i], loss.teacher, slice.entry(vector) + i);
    }
    if (held == nullptr) return;
    *reinterpret_cast<float4*>(place(vector - slice.begin)) = make_float4(z[0], z[1], z[2], z[3]);
    if (loss.has_teacher) *reinterpret_cast<float4*>(place(held_vectors + vector - slice.begin)) = make_float4(y[0], y[1], y[2], y[3]);
  }
  DK_DEVICE void edge(const Slice& slice, float& z, float& y) const {
    const int at = 2 * int(threadIdx.x);
    if (!from_memory()) {
      z = edges()[at];
      y = edges()[at + 1];
      return;
    }
    z = meant_logit(load(student + slice.edge), loss.student, slice.edge);
    if (loss.has_teacher) y = meant_logit(load(teacher + slice.edge), loss.teacher, slice.edge);
    if (held == nullptr) return;
    edges()[at] = z;
    edges()[at + 1] = y;
  }

  // use(z, y, entry): all of this thread's logits, four neighbours at a time or one, the first of them being `entry`. The loads of the next
  // four are under way while these are used.
  template <class Use>
  DK_DEVICE void over(const Slice& slice, Use use) const {
    if (slice.edge >= 0) {
      float z[1], y[1] = {};
      edge(slice, z[0], y[0]);
      use(z, y, slice.edge);
    }
    float4 z4, y4, next_z4, next_y4{};
    int v = slice.begin + int(threadIdx.x);
    if (v < slice.end) fetch(slice, v, next_z4, next_y4);
#pragma unroll 1
    for (; v < slice.end; v += int(blockDim.x)) {
      z4 = next_z4;
      y4 = next_y4;
      if (v + int(blockDim.x) < slice.end) fetch(slice, v + int(blockDim.x), next_z4, next_y4);
      float z[kEntries] = {z4.x, z4.y, z4.z, z4.w}, y[kEntries] = {y4.x, y4.y, y4.z, y4.w};
      meant(slice, v, z, y);
      use(z, y, slice.entry(v));
    }
  }
};

DK_DEVICE void write_gradient(const Rows& rows, int64_t at, const float (&dz)[kEntries]) {
  if (rows.dz_element == Element::kFloat32) {
    store(reinterpret_cast<float4*>(static_cast<float*>(rows.dz) + at), make_float4(dz[0], dz[1], dz[2], dz[3]));
  } else {
    const bool wide = rows.dz_element == Element::kBfloat16;
    const uint32_t low = wide ? pair_bfloat16(dz[0], dz[1]) : pair_float16(dz[0], dz[1]);
    const uint32_t high = wide ? pair_bfloat16(dz[2], dz[3]) : pair_float16(dz[2], dz[3]);
    store(reinterpret_cast<uint2*>(static_cast<uint16_t*>(rows.dz) + at), make_uint2(low, high));
  }
}
DK_DEVICE void write_gradient(const Rows& rows, int64_t at, const float (&dz)[1]) {
  if (rows.dz_element == Element::kFloat32) store(static_cast<float*>(rows.dz) + at, dz[0]);
  else if (rows.dz_element == Element::kBfloat16) store(static_cast<__nv_bfloat16*>(rows.dz) + at, __float2bfloat16_rn(dz[0]));
  else store(static_cast<__half*>(rows.dz) + at, __float2half_rn(dz[0]));
}

// Of a token that does not count.
DK_DEVICE void write_no_gradient(const Rows& rows, const Slice& slice) {
  const float zero[1] = {}, zeros[kEntries] = {};
  if (slice.edge >= 0) write_gradient(rows, slice.row + slice.edge, zero);
  for (int v = slice.begin + int(threadIdx.x); v < slice.end; v += int(blockDim.x)) write_gradient(rows, slice.row + slice.entry(v), zeros);
}

template <class Divergence>
__global__ void __launch_bounds__(kMostRowThreads, 1)
row_kernel(const __grid_constant__ Loss loss, const __grid_constant__ Rows rows, const Divergence divergence) {
  DK_SHARED(memory);
  Boards& boards = *reinterpret_cast<Boards*>(memory);
  const int64_t token = blockIdx.x / cluster_size();
  const Slice slice = slice_of(token, loss.vocabulary);
  const float* coefficients = loss.coefficients + token * kTerms;
  const bool writes_terms = cluster_rank() == 0 && threadIdx.x == 0;
  if (!counts(coefficients)) {
    if (writes_terms) write_no_terms(token, loss);
    if (rows.dz != nullptr) write_no_gradient(rows, slice);
    return;
  }
  const int64_t named = loss.labels == nullptr ? -1 : load(loss.labels + token);
  const int label = named < 0 ? -1 : int(named);
  float* held = rows.held_vectors > 0 ? reinterpret_cast<float*>(memory + kRowBoardBytes) : nullptr;
  Logits logits{loss, rows.student_logits + slice.row, rows.teacher_logits + slice.row, held, rows.held_vectors, true};

  Statistics statistics = no_statistics();
  logits.over(slice, [&](auto& z, auto& y, int first) {
    take_statistics<false>(statistics, z, y, [first](int i) { return first + i; }, label, loss, divergence);
  });
  logits.fresh = false;
  statistics = over_row(statistics, no_statistics(), boards.statistics,
                        [&](Statistics& into, const Statistics& other) { merge(into, other, loss, divergence); });
  const Merged m = merged(statistics, loss, divergence);

  Totals totals = no_totals();
  if (wants_totals<Divergence>(m, loss)) {  // all threads of the cluster, or none
    logits.over(slice, [&](auto& z, auto& y, int first) {
      take_totals<false>(totals, z, y, [first](int i) { return first + i; }, m, loss, divergence);
    });
    totals = over_row(totals, no_totals(), boards.totals, [](Totals& into, const Totals& other) { merge(into, other); });
  }
  if (cluster_size() > 1) cluster_arrive();  // this block has read what it wants of the others

  const Factors factors = finish<Divergence>(m, totals, coefficients, label, loss);
  if (writes_terms) write_terms(token, m, totals, factors, loss);
  if (rows.dz != nullptr) {
    const float scale = loss.student.scale * (rows.dz_scale == nullptr ? 1.0f : load(rows.dz_scale));
    logits.over(slice, [&](auto& z, auto& y, int first) {
      constexpr int kCount = std::extent_v<std::remove_reference_t<decltype(z)>>;
#pragma unroll
      for (int i = 0; i < kCount; ++i) z[i] = gradient(z[i], y[i], first + i, label, m, factors, scale, loss, divergence);
      write_gradient(rows, slice.row + first, z);
    });
  }
  if (cluster_size() > 1) cluster_wait();  // and the others of this one, whose shared memory is gone afterwards
}

template <class Divergence>
void launch_rows(const Loss& loss, const Rows& rows, const RowLaunch& as, const float* parameters, void* stream) {
  launch(&row_kernel<Divergence>, dim3(unsigned(loss.tokens) * as.cluster), as.cluster, dim3(as.threads), row_shared_bytes(loss, rows), stream,
         loss, rows, Divergence::from(parameters));
}

}  // namespace distill_kernels::cuda
