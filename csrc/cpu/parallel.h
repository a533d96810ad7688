// Runs task(context, i, worker) for every i in [0, count) on up to `threads` threads and returns when all are done. `worker` is
// below `threads` and no two tasks run under one worker at a time, so that it can index scratch memory.
#pragma once

#include <cstdint>

namespace distill_kernels {

using Task = void (*)(void* context, int64_t i, int worker);

void parallel_for(int64_t count, int threads, Task task, void* context);

}  // namespace distill_kernels
