// What the sweep's kernels do beside multiplying: one loop over the tiles of a block, the sums of every token that a thread sees some
// entries of, and their merge. sweep_mma.cu and sweep_wgmma.cu bring the products.
//
// A block owns kSweepRows tokens and a split of the vocabulary. For each kSweepEntries of the split it multiplies the student's hidden
// states with the tile's rows of its head, then the teacher's, both tiles of logits staying in registers; then each thread takes the
// entries that it holds of a token into sums of its own, which lie in shared memory in between. At the end a token's sums are merged, in
// the order of the threads, and written; sweep.cu merges those of all splits, in an order that their number fixes. The same inputs give
// the same bits.
//
// Flops of a pass 2 · N · V · (D_s + D_t), N and V rounded up to whole tiles and D to whole stages of the ring. Bytes of hidden states and
// heads that it asks for, E of an element:
//
//     (⌈N / (kSweepRows · cluster)⌉ · V + ⌈V / kSweepEntries⌉ · N) · (D_s + D_t) · E
//
// the heads once for every cluster, the hidden states once for every tile of the vocabulary. Biases and labels come beside them.
#pragma once

#include "mma.cuh"
#include "statistics.cuh"
#include "sweep.h"

namespace distill_kernels::cuda {

// Sums as they are kept: what a sweep without stats needs of them.
struct SweptStatistics {
  float max_q, min_q, sum_q, sum_untempered, sum_of_logits, label_logit, max_p, min_p, sum_p, value, slope;
};
struct SweptTotals {
  float value, slope, sum_of_log_q, unclamped;
};

DK_DEVICE SweptStatistics kept(const Statistics& s) {
  return {s.q.maximum, s.q.minimum, s.q.sum, s.sum_untempered, s.sum_of_logits, s.label_logit,
          s.p.maximum, s.p.minimum, s.p.sum, s.value,          s.slope};
}
DK_DEVICE Statistics whole(const SweptStatistics& s) {
  Statistics all = no_statistics();
  all.q = {s.max_q, s.min_q, s.sum_q, 0};
  all.p = {s.max_p, s.min_p, s.sum_p, 0};
  all.sum_untempered = s.sum_untempered;
  all.sum_of_logits = s.sum_of_logits;
  all.label_logit = s.label_logit;
  all.value = s.value;
  all.slope = s.slope;
  return all;
}
DK_DEVICE SweptTotals kept(const Totals& t) { return {t.value, t.slope, t.sum_of_log_q, t.unclamped}; }
DK_DEVICE Totals whole(const SweptTotals& t) {
  Totals all = no_totals();
  all.value = t.value;
  all.slope = t.slope;
  all.sum_of_log_q = t.sum_of_log_q;
  all.unclamped = t.unclamped;
  return all;
}

// A struct of words of 32 bits, word by word.
template <class T>
DK_DEVICE T load_words(const T* from) {
  uint32_t words[sizeof(T) / 4];
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / 4; ++i) words[i] = load(reinterpret_cast<const uint32_t*>(from) + i);
  T value;
  memcpy(&value, words, sizeof value);
  return value;
}
template <class T>
DK_DEVICE void store_words(T* to, const T& value) {
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof value);
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / 4; ++i) store(reinterpret_cast<uint32_t*>(to) + i, words[i]);
}

// The two passes over the heads. TakesStatistics: of all tokens. TakesTotals: once the log-sum-exps are known, of tokens with an entry
// below the floor, which are few if there are any.
template <class Divergence>
struct TakesStatistics {
  using Kept = SweptStatistics;
  static constexpr bool kAll = true;
  const Sweep& sweep;
  const Divergence& divergence;

  DK_DEVICE Kept* written() const { return sweep.statistics; }
  DK_DEVICE Kept none() const { return kept(no_statistics()); }
  template <int N, class Entry>
  DK_DEVICE void take(Kept& sums, const float (&z)[N], const float (&y)[N], Entry entry, int64_t, int label) const {
    Statistics all = whole(sums);
    take_statistics<true>(all, z, y, entry, label, sweep.loss, divergence);
    sums = kept(all);
  }
  DK_DEVICE void merge_into(Kept& sums, const Kept& other) const {
    Statistics all = whole(sums);
    merge(all, whole(other), sweep.loss, divergence);
    sums = kept(all);
  }
};
template <class Divergence>
struct TakesTotals {
  using Kept = SweptTotals;
  static constexpr bool kAll = false;
  const Sweep& sweep;
  const Divergence& divergence;

  DK_DEVICE Kept* written() const { return sweep.totals; }
  DK_DEVICE Kept none() const { return kept(no_totals()); }
  template <int N, class Entry>
  DK_DEVICE void take(Kept& sums, const float (&z)[N], const float (&y)[N], Entry entry, int64_t token, int) const {
    Totals all = whole(sums);
    const Merged merged = token < sweep.loss.tokens ? load_words(sweep.merged + token) : Merged{};
    take_totals<true>(all, z, y, entry, merged, sweep.loss, divergence);
    sums = kept(all);
  }
  DK_DEVICE void merge_into(Kept& sums, const Kept& other) const {
    Totals all = whole(sums);
    merge(all, whole(other));
    sums = kept(all);
  }
};

constexpr int kTakenEntries = 8;  // of a token, that a thread takes at a time

// Who holds what of a tile of logits: WARPS_DOWN · WARPS_ACROSS warps, each a part of 16 · FRAGMENTS_DOWN tokens and
// 8 · FRAGMENTS_ACROSS entries.
template <int WARPS_DOWN, int WARPS_ACROSS, int FRAGMENTS_DOWN, int FRAGMENTS_ACROSS>
struct Parts {
  static constexpr int kThreads = 32 * WARPS_DOWN * WARPS_ACROSS;
  static constexpr int kRowsOfWarp = 16 * FRAGMENTS_DOWN, kEntriesOfWarp = 8 * FRAGMENTS_ACROSS;
  static constexpr int kRowsOfThread = 2 * FRAGMENTS_DOWN, kEntriesOfThread = 2 * FRAGMENTS_ACROSS;
  static constexpr int kGroupsOfRow = kEntriesOfThread / kTakenEntries;
  static constexpr int kHoldersOfRow = 4 * WARPS_ACROSS;  // threads
  static constexpr int kFragmentsDown = FRAGMENTS_DOWN, kFragmentsAcross = FRAGMENTS_ACROSS;
  static_assert(WARPS_DOWN * kRowsOfWarp == kSweepRows && WARPS_ACROSS * kEntriesOfWarp == kSweepEntries, "the parts make a tile");
  using Logits = Fragment[FRAGMENTS_DOWN][FRAGMENTS_ACROSS];

  static DK_DEVICE int first_row(int thread) { return thread / 32 / WARPS_ACROSS * kRowsOfWarp; }
  static DK_DEVICE int first_entry(int thread) { return thread / 32 % WARPS_ACROSS * kEntriesOfWarp; }
  // Of the thread's rows and entries the i-th, in the tile.
  static DK_DEVICE int row(int thread, int i) { return first_row(thread) + i / 2 * 16 + i % 2 * 8 + thread % 32 / 4; }
  static DK_DEVICE int entry(int thread, int i) { return first_entry(thread) + i / 2 * 8 + i % 2 + thread % 4 * 2; }
  // The other way round: the i-th thread that holds a row, and which of its rows that is.
  static DK_DEVICE int holder(int row, int i) {
    return (row / kRowsOfWarp * WARPS_ACROSS + i / 4) * 32 + row % 8 * 4 + i % 4;
  }
  static DK_DEVICE int row_of_holder(int row) { return row % kRowsOfWarp / 8; }
};

// Every thread's sums, one for each row that it holds, in shared memory word by word: threads next to each other use different banks.
template <class Parts, class Kept>
struct OwnSums {
  static constexpr int kWords = sizeof(Kept) / sizeof(float);
  static constexpr int kBytes = sizeof(Kept) * Parts::kRowsOfThread * Parts::kThreads;
  float* words;

  DK_DEVICE float* at(int thread, int row) const { return words + row * Parts::kThreads + thread; }
  DK_DEVICE Kept get(int thread, int row) const {
    float all[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) all[i] = at(thread, row)[i * Parts::kRowsOfThread * Parts::kThreads];
    Kept sums;
    memcpy(&sums, all, sizeof sums);
    return sums;
  }
  DK_DEVICE void put(int thread, int row, const Kept& sums) const {
    float all[kWords];
    memcpy(all, &sums, sizeof sums);
#pragma unroll
    for (int i = 0; i < kWords; ++i) at(thread, row)[i * Parts::kRowsOfThread * Parts::kThreads] = all[i];
  }
};

// Where a block is.
struct Place {
  int64_t first_token;
  int split, begin, end;  // of the vocabulary
};

DK_DEVICE Place place_of_block(const Sweep& sweep) {
  const int blocks = gridDim.x / sweep.splits;  // of tokens; neighbours share a split, and what the caches hold of the heads
  const int split = blockIdx.x / blocks;
  const int begin = int(min(int64_t(split) * sweep.split_entries, int64_t(sweep.loss.vocabulary)));
  return {int64_t(blockIdx.x % blocks) * kSweepRows, split, begin, begin + min(sweep.split_entries, sweep.loss.vocabulary - begin)};
}

// Whether the pass has work among `rows` tokens. By a whole warp.
template <class Takes>
DK_DEVICE bool wanted(const Takes& takes, int64_t first_token, int rows) {
  if (Takes::kAll) return true;
  bool any = false;
  for (int row = threadIdx.x % 32; row < rows; row += 32)
    any |= first_token + row < takes.sweep.loss.tokens && load(&takes.sweep.merged[first_token + row].clamped);
  return __any_sync(kAllLanes, any);
}

// Negative: there is none. What stands for none does not fit an int.
DK_DEVICE int label_of(const Loss& loss, int64_t token) {
  const int64_t label = loss.labels == nullptr ? -1 : load(loss.labels + token);
  return label < 0 ? -1 : int(label);
}

// Takes the logits that a thread holds of a tile into its sums of their tokens.
template <class Parts, class Takes>
DK_DEVICE void take_tile(
    const Takes& takes, typename Parts::Logits& student, typename Parts::Logits& teacher, const OwnSums<Parts, typename Takes::Kept>& own,
    const Place& place, int at, int thread) {
  const Loss& loss = takes.sweep.loss;
  // The code of a few entries of one row, again and again: that of all of them takes five times as long to compile, and their copies more
  // registers than there are. Registers have no index, so what is taken is selected.
#pragma unroll 1
  for (int turn = 0; turn < Parts::kRowsOfThread * Parts::kGroupsOfRow; ++turn) {
    const int row = turn / Parts::kGroupsOfRow, group = turn % Parts::kGroupsOfRow;
    const int64_t token = place.first_token + Parts::row(thread, row);
    const int label = token < loss.tokens ? label_of(loss, token) : -1;
    const auto entry = [&](int i) { return at + Parts::entry(thread, group * kTakenEntries + i); };
    const auto select = [turn](const typename Parts::Logits& logits, int i) {
      float selected = 0.0f;
#pragma unroll
      for (int t = 0; t < Parts::kRowsOfThread * Parts::kGroupsOfRow; ++t) {
        const int r = t / Parts::kGroupsOfRow, at_entry = t % Parts::kGroupsOfRow * kTakenEntries + i;
        if (turn == t) selected = logits[r / 2][at_entry / 2][r % 2 * 2 + at_entry % 2];
      }
      return selected;
    };
    float z[kTakenEntries], y[kTakenEntries];
#pragma unroll
    for (int i = 0; i < kTakenEntries; ++i) {
      const int inside = min(entry(i), loss.vocabulary - 1);  // beyond the vocabulary a logit may be anything, but has no bias
      z[i] = meant_logit(select(student, i), loss.student, inside);
      y[i] = loss.has_teacher ? meant_logit(select(teacher, i), loss.teacher, inside) : z[i];
    }
    auto sums = own.get(thread, row);
    takes.take(sums, z, y, entry, token, label);
    own.put(thread, row, sums);
  }
}

// The loop over the tiles of a block, by each of the threads that multiply. `products.multiply(model, logits)` multiplies the next tile.
template <class Parts, class Takes, class Products>
DK_DEVICE void sweep_tiles(
    const Takes& takes, Products& products, const OwnSums<Parts, typename Takes::Kept>& own, const Place& place, int thread) {
#pragma unroll
  for (int row = 0; row < Parts::kRowsOfThread; ++row) own.put(thread, row, takes.none());
  for (int at = place.begin; at < place.end; at += kSweepEntries) {
    typename Parts::Logits student, teacher;
    products.multiply(takes.sweep.student, student);
    if (takes.sweep.loss.has_teacher) products.multiply(takes.sweep.teacher, teacher);
    take_tile<Parts>(takes, student, teacher, own, place, at, thread);
  }
}

// Merges the sums of every token and writes them, once all threads that multiply are through `sweep_tiles` and a barrier.
template <class Parts, class Takes>
DK_DEVICE void write_sums(const Takes& takes, const OwnSums<Parts, typename Takes::Kept>& own, const Place& place, int thread) {
  const int row = thread;
  const int64_t token = place.first_token + row;
  if (row >= kSweepRows || token >= takes.sweep.loss.tokens) return;
  auto sums = own.get(Parts::holder(row, 0), Parts::row_of_holder(row));
  for (int i = 1; i < Parts::kHoldersOfRow; ++i) takes.merge_into(sums, own.get(Parts::holder(row, i), Parts::row_of_holder(row)));
  store_words(takes.written() + token * takes.sweep.splits + place.split, sums);
}

}  // namespace distill_kernels::cuda
