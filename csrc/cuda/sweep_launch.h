// The launches of the sweep's two kernels, compiled in a file each.
#pragma once

#include "statistics.cuh"
#include "sweep.h"

// Those whose sums can be renormalised, and none at all.
#define DK_FOR_EACH_SWEPT(X) X(no_divergence) X(forward_kl) X(reverse_kl) X(student_entropy)

namespace distill_kernels::cuda {

template <class Divergence>
struct TakesStatistics;
template <class Divergence>
struct TakesTotals;

// One pass over the heads; see sweep.cuh for what a pass takes.
template <template <class> class Takes, class Divergence>
void launch_mma(const Sweep& sweep, const Divergence& divergence, void* stream);

template <template <class> class Takes, class Divergence>
void launch_wgmma(const Sweep& sweep, const Divergence& divergence, int cluster, void* stream);

// Bytes of a block's shared memory in either pass: of totals, or of statistics.
size_t mma_shared_bytes(bool totals);
size_t wgmma_shared_bytes(bool totals);

}  // namespace distill_kernels::cuda
