// Which columns of dz a chunk's gradient products go over: what distill_kernels/estimators/columns.py derives, in one thread and a few passes.
#pragma once

#include <cstdint>

namespace distill_kernels {

// units (vocabulary) ← inclusion probabilities min(1, score / t) in units of 2⁻³², summing to `kept` exactly, positive where the score is;
// columns (kept), ascending, and weights (kept) ← those on which the points uniform·2⁻³² + i fall, and 1 / probability.
void draw_columns(const float* scores, int64_t vocabulary, int64_t kept, int64_t uniform, int64_t* units, int64_t* columns, float* weights);

}  // namespace distill_kernels
