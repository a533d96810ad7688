// Arguments of the row kernel.
#pragma once

#include <cstddef>

#include "loss.h"

namespace distill_kernels::cuda {

constexpr int kMostRowThreads = 512;
constexpr int kRowBoardBytes = 1456;  // of a block's shared memory, before the logits that it holds
constexpr int kRowEdgeBytes = 64;     // after them

struct Rows {
  const float* student_logits;  // (tokens, vocabulary), bare products
  const float* teacher_logits;  // likewise; null: there is no teacher
  void* dz;                     // (tokens, vocabulary), written, may be student_logits; null: not wanted
  Element dz_element;
  const float* dz_scale;        // () multiplies dz; null: 1
  int held_vectors;             // of four logits of each model that fit a block's shared memory: at least its slice, or 0: not held
};

struct RowLaunch {
  unsigned cluster, threads;  // blocks to a token, and threads to a block, a multiple of 32
};

inline size_t row_shared_bytes(const Loss& loss, const Rows& rows) {
  const size_t of_vector = 4 * sizeof(float) * (loss.has_teacher ? 2 : 1);
  return kRowBoardBytes + (rows.held_vectors > 0 ? rows.held_vectors * of_vector + kRowEdgeBytes : 0);
}

// One for each divergence of DK_FOR_EACH_DIVERGENCE, and for none.
template <class Divergence>
void launch_rows(const Loss& loss, const Rows& rows, const RowLaunch& as, const float* parameters, void* stream);

}  // namespace distill_kernels::cuda
