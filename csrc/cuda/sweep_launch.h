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

}  // namespace distill_kernels::cuda
