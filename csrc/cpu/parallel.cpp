// The threads are torch's own where it has an OpenMP runtime in the process, so that the two never compete for cores: a second
// runtime's workers would spin against torch's for milliseconds after each of its parallel regions. The runtime is found by name,
// not linked (GNU's, LLVM's and Intel's all export GOMP_parallel); without one, plain threads are started.
#include "parallel.h"

#include <atomic>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace distill_kernels {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

GompParallel find_openmp() {
#if defined(__unix__) || defined(__APPLE__)
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

struct Region {
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};
  int64_t count;
  Task task;
  void* context;

  // Tasks are handed out one by one. Which thread runs a task never changes its result, so results do not depend on the timing.
  static void work(void* self) {
    Region& region = *static_cast<Region*>(self);
    const int worker = region.workers.fetch_add(1);
    for (int64_t i; (i = region.next.fetch_add(1)) < region.count;) region.task(region.context, i, worker);
  }
};

}  // namespace

void parallel_for(int64_t count, int threads, Task task, void* context) {
  Region region;
  region.count = count;
  region.task = task;
  region.context = context;
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) return Region::work(&region);
  static const GompParallel openmp = find_openmp();
  if (openmp != nullptr) return openmp(&Region::work, &region, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> workers;
  for (int i = 1; i < threads; ++i) workers.emplace_back(&Region::work, &region);
  Region::work(&region);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace distill_kernels
