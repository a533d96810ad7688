// Kernels of column-sampled gradients: what is gathered for the products over the kept columns, and what is scattered of their results.
#pragma once

#include "loss.h"

namespace distill_kernels::cuda {

// out (tokens, kept) ← dz (tokens, vocabulary)[:, columns] · weights / divisor. Reads and writes of different elements.
struct GatherColumns {
  const void* dz;
  Element dz_element;
  int64_t tokens, vocabulary;
  const int64_t* columns;  // (kept) ascending
  const float* weights;    // (kept)
  const float* divisor;    // () what dz was multiplied by; null: 1
  int64_t kept;
  void* out;
  Element out_element;
};
void gather_columns(const GatherColumns& gather, int threads, void* stream);

// out (count, bytes) ← rows of `matrix` that `places` names; rows are `stride` bytes apart.
void gather_rows(const void* matrix, int64_t stride, const int64_t* places, int64_t count, int64_t bytes, void* out, int threads, void* stream);

// matrix (·, dim)[places] += rows (count, dim), float32; no place is named twice.
void scatter_rows(float* matrix, const int64_t* places, int64_t count, int64_t dim, const float* rows, int threads, void* stream);

}  // namespace distill_kernels::cuda
