// Runs task(context, i) for every i in [0, count) on up to `threads` threads and returns when all are done.
#pragma once

#include <cstdint>

namespace distill_kernels {

void parallel_for(int64_t count, int threads, void (*task)(void* context, int64_t i), void* context);

}  // namespace distill_kernels
