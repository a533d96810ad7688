// The tile-fused sweep from end to end: a pass over the heads, the merge of its splits, and where a token has an entry below the floor a
// second pass and the end of those tokens. No logits in memory.
#include "../generated/divergence_list.h"
#include "sweep.cuh"
#include "sweep_launch.h"

namespace distill_kernels::cuda {
namespace {

constexpr int kMergeThreads = 128;

// Of one token's splits, by a warp: its lanes take every 32nd, and are merged pairwise.
template <class Takes>
DK_DEVICE typename Takes::Kept merge_splits(const Takes& takes, int64_t token) {
  const int lane = threadIdx.x % 32;
  auto sums = takes.none();
  for (int split = lane; split < takes.sweep.splits; split += 32)
    takes.merge_into(sums, load_words(takes.written() + token * takes.sweep.splits + split));
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const auto other = shuffle_xor(sums, lanes);
    takes.merge_into(sums, other);
  }
  return sums;
}

// One warp for a token: its terms, unless they need totals.
template <class Divergence>
__global__ void __launch_bounds__(kMergeThreads) merge_statistics(const __grid_constant__ Sweep sweep, const Divergence divergence) {
  const int64_t token = int64_t(blockIdx.x) * (kMergeThreads / 32) + threadIdx.x / 32;
  const Loss& loss = sweep.loss;
  if (token >= loss.tokens) return;
  const float* const coefficients = loss.coefficients + token * kTerms;
  const bool counted = counts(coefficients);
  Merged merged_token{};
  if (counted) {
    const TakesStatistics<Divergence> takes{sweep, divergence};
    merged_token = merged(whole(merge_splits(takes, token)), loss, divergence);
    merged_token.clamped = wants_totals<Divergence>(merged_token, loss);
  }
  if (threadIdx.x % 32 != 0) return;
  store_words(sweep.merged + token, merged_token);
  if (!counted) {
    write_no_terms(token, loss);
  } else if (!merged_token.clamped) {
    const Factors factors = finish<Divergence>(merged_token, no_totals(), coefficients, label_of(loss, token), loss);
    write_terms(token, merged_token, no_totals(), factors, loss);
  }
}

// One warp for a token: the terms of one that needs totals.
template <class Divergence>
__global__ void __launch_bounds__(kMergeThreads) finish_totals(const __grid_constant__ Sweep sweep, const Divergence divergence) {
  const int64_t token = int64_t(blockIdx.x) * (kMergeThreads / 32) + threadIdx.x / 32;
  const Loss& loss = sweep.loss;
  if (token >= loss.tokens || !load(&sweep.merged[token].clamped)) return;
  const TakesTotals<Divergence> takes{sweep, divergence};
  const Totals totals = whole(merge_splits(takes, token));
  if (threadIdx.x % 32 != 0) return;
  const Merged merged_token = load_words(sweep.merged + token);
  const float* const coefficients = loss.coefficients + token * kTerms;
  const Factors factors = finish<Divergence>(merged_token, totals, coefficients, label_of(loss, token), loss);
  write_terms(token, merged_token, totals, factors, loss);
}

template <class Divergence>
void sweep_as(const Sweep& sweep, Instructions instructions, int cluster, void* stream, const Divergence& divergence) {
  const auto pass = [&](auto launch_mma_pass, auto launch_wgmma_pass) {
    if (instructions == Instructions::kMma) {
      launch_mma_pass(sweep, divergence, stream);
    } else {
      launch_wgmma_pass(sweep, divergence, cluster, stream);
    }
  };
  const dim3 warps(unsigned((sweep.loss.tokens + kMergeThreads / 32 - 1) / (kMergeThreads / 32)));
  pass(launch_mma<TakesStatistics, Divergence>, launch_wgmma<TakesStatistics, Divergence>);
  launch(merge_statistics<Divergence>, warps, 1, dim3(kMergeThreads), 0, stream, sweep, divergence);
  if (!kActive<Divergence> && !sweep.loss.smoothing) return;  // nothing has a floor but the label, which needs no totals
  pass(launch_mma<TakesTotals, Divergence>, launch_wgmma<TakesTotals, Divergence>);
  launch(finish_totals<Divergence>, warps, 1, dim3(kMergeThreads), 0, stream, sweep, divergence);
}

template <class Divergence, class... Arguments>
void sweep_if_one_pass(const char* name, const float* parameters, const Arguments&... arguments) {
  if constexpr (Divergence::one_pass) {
    sweep_as(arguments..., Divergence::from(parameters));
  } else {
    throw std::invalid_argument(std::string("the sweep keeps no logits, and sums of ") + name + " want them twice");
  }
}

}  // namespace

int64_t sweep_token_bytes(int splits) { return splits * int64_t(sizeof(SweptStatistics) + sizeof(SweptTotals)) + int64_t(sizeof(Merged)); }

int64_t sweep_shared_bytes(Instructions instructions, bool totals) {
  return int64_t(instructions == Instructions::kMma ? mma_shared_bytes(totals) : wgmma_shared_bytes(totals));
}

void sweep(Sweep sweep, void* workspace, int divergence, const float* parameters, Instructions instructions, int cluster, void* stream) {
  const int64_t partial = sweep.loss.tokens * sweep.splits;
  sweep.statistics = static_cast<SweptStatistics*>(workspace);
  sweep.totals = reinterpret_cast<SweptTotals*>(sweep.statistics + partial);
  sweep.merged = reinterpret_cast<Merged*>(sweep.totals + partial);
  if (sweep.loss.tokens == 0) return;
  if (divergence < 0) return sweep_as(sweep, instructions, cluster, stream, no_divergence{});
  int index = 0;
#define DK_TRY(NAME) \
  if (divergence == index++) return sweep_if_one_pass<NAME>(#NAME, parameters, sweep, instructions, cluster, stream);
  DK_FOR_EACH_DIVERGENCE(DK_TRY)
#undef DK_TRY
  throw std::invalid_argument("no divergence has the index " + std::to_string(divergence));
}

}  // namespace distill_kernels::cuda
