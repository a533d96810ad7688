// The fibers of cuda_emulation.h. Never instrumented by a sanitizer itself: with -DEMULATION_TSAN or -DEMULATION_ASAN it tells that
// sanitizer which fiber runs, and which barriers order memory.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <random>
#include <vector>

#include "instructions.h"

#if !defined(__x86_64__)
#error "the emulation switches stacks in x86-64 assembly"
#endif

#ifdef EMULATION_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif
#ifdef EMULATION_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}
#endif

// Leaves the stack at *from and goes on at `to`: what a function has to keep of its registers lies on the stack that it leaves.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

namespace emulation {
namespace {

constexpr size_t kStack = 256 << 10;  // instrumented frames are large
constexpr unsigned kBarriers = 16;
constexpr size_t kMostCopies = 256;

struct Block;
struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Block* block = nullptr;
  unsigned index = 0;  // within the block
  bool done = false, waiting = false, fresh = true;
  // What it waits for.
  const char* what = "";
  unsigned mask = 0;
  void* operand = nullptr;
  Complete complete = nullptr;
  bool orders_memory = false;
  bool (*ready)(const void*) = nullptr;
  const void* state = nullptr;
  bool cluster_arrived = false;
  uint64_t cluster_phase = 0;
  unsigned first_copy = 0, copies = 0, group = 0;  // asynchronous, in the order of issue: a ring of copies_put_off
  void* thread_sanitizer = nullptr;
  void* fake_stack = nullptr;
};

struct Barrier {
  unsigned threads = 0, expected = 0;
  int site = 0;
  std::vector<int, Unheard<int>> waiting;
  char tag = 0;
};

struct Block {
  uint3 index;
  unsigned rank;
  unsigned running;  // threads
  unsigned char* shared;
  Barrier barriers[kBarriers];
  char warp_tags[32];
};

struct PutOff {
  Copy copy;
  unsigned group;
};

std::vector<Fiber> fibers;
std::vector<PutOff, Unheard<PutOff>> copies_put_off;  // kMostCopies of each fiber
std::vector<char*> stacks;  // kept from launch to launch
[[maybe_unused]] size_t stacks_used = 0;  // by this launch
[[maybe_unused]] std::vector<void*> thread_sanitizer_fibers;
std::vector<Block*> blocks;
std::vector<int, Unheard<int>> runnable;
size_t runnable_head = 0;
int current = -1;
void* scheduler_stack = nullptr;
dim3 block_dimensions, grid_dimensions;
unsigned blocks_in_cluster = 1, threads_in_block = 0;
size_t bytes_of_shared = 0;
const std::function<void()>* kernel = nullptr;
std::string failure;
std::mt19937 generator;
bool shuffles = false, late = true, favours = false;
unsigned favourite = 0;
uint64_t switch_count = 0;
Traffic bytes{};
// Of the cluster that runs.
unsigned cluster_arrivals = 0;
uint64_t cluster_phase = 0;
char cluster_tag, launch_tag;
// For the sanitizers.
[[maybe_unused]] void* scheduler_fiber = nullptr;
[[maybe_unused]] const void* scheduler_bottom = nullptr;
[[maybe_unused]] size_t scheduler_size = 0;

Fiber& me() { return fibers[current]; }

void wake(int fiber) {
  fibers[fiber].waiting = false;
  runnable.push_back(fiber);
}

// From a fiber to the scheduler.
void leave() {
  Fiber& fiber = me();
  ++switch_count;
#ifdef EMULATION_ASAN
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, scheduler_bottom, scheduler_size);
#endif
#ifdef EMULATION_TSAN
  __tsan_switch_to_fiber(scheduler_fiber, 1);  // 1: orders no memory
#endif
  emulation_switch(&fiber.stack_pointer, scheduler_stack);
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(me().fake_stack, &scheduler_bottom, &scheduler_size);
#endif
}

void enter() {
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  try {
    (*kernel)();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  release(&launch_tag);
  me().done = true;
  leave();
}

void resume(int which) {
  current = which;
  Fiber& fiber = fibers[which];
#ifdef EMULATION_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStack);
#endif
#ifdef EMULATION_TSAN
  __tsan_switch_to_fiber(fiber.thread_sanitizer, fiber.fresh ? 0 : 1);  // what was before the launch is seen by all
#endif
  fiber.fresh = false;
  emulation_switch(&scheduler_stack, fiber.stack_pointer);
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void sleep(const char* what) {
  me().waiting = true;
  me().what = what;
  leave();
}

void poison(unsigned char* memory) {
  volatile unsigned char* at = memory;  // no memset, of which a sanitizer would hear
  for (size_t i = 0; i < bytes_of_shared; ++i) at[i] = 0xff;
}

void start(int index, Block* block, unsigned thread) {
  Fiber& fiber = fibers[index];
  fiber = Fiber{};
  // A race detector has a thread of its own for every one of a launch, and a stack, since those of two blocks race; the next launch has them
  // again, for it comes after this one.
#ifdef EMULATION_TSAN
  const size_t stack = stacks_used++;
  if (thread_sanitizer_fibers.size() <= stack) thread_sanitizer_fibers.push_back(__tsan_create_fiber(0));
  fiber.thread_sanitizer = thread_sanitizer_fibers[stack];
#else
  const size_t stack = index;
#endif
  if (stacks.size() <= stack) {
    // By the system itself: a race detector clears what it knows of memory that the library maps, all 256 kB.
    const long memory = syscall(SYS_mmap, nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == -1) throw Error("no memory for the stack of a fiber");
    stacks.push_back(reinterpret_cast<char*>(memory));
  }
  fiber.stack = stacks[stack];
  fiber.block = block;
  fiber.index = thread;
  void** top = reinterpret_cast<void**>(fiber.stack + kStack) - 4;
  *top = reinterpret_cast<void*>(&enter);  // at a multiple of 16, so that `enter` finds the stack as after a call
  fiber.stack_pointer = top - 6;           // the registers of emulation_switch
  for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
  runnable.push_back(index);
}

int next() {
  if (shuffles) {
    size_t at = runnable_head + generator() % (runnable.size() - runnable_head);
    for (size_t i = runnable_head; favours && i < runnable.size(); ++i)
      if (fibers[runnable[i]].block->rank == favourite % blocks_in_cluster) at = i;
    std::swap(runnable[runnable_head], runnable[at]);
  }
  const int fiber = runnable[runnable_head++];
  if (runnable_head > 4096) {
    runnable.erase(runnable.begin(), runnable.begin() + runnable_head);
    runnable_head = 0;
  }
  return fiber;
}

bool poll() {
  bool any = false;
  for (int i = 0; i < int(fibers.size()); ++i)
    if (fibers[i].waiting && fibers[i].ready != nullptr && fibers[i].ready(fibers[i].state)) {
      fibers[i].ready = nullptr;
      wake(i);
      any = true;
    }
  return any;
}

[[noreturn]] void deadlock() {
  std::string message = "deadlock:";
  for (const Fiber& fiber : fibers)
    if (fiber.waiting) {
      const std::string what = fiber.what;
      if (message.find(what) == std::string::npos)
        message += " thread " + std::to_string(fiber.index) + " of block " + std::to_string(fiber.block->index.x) + " waits at " + what + ";";
    }
  throw Error(message);
}

void run_cluster(unsigned first_block) {
  const unsigned threads = threads_in_block;
  fibers.assign(size_t(threads) * blocks_in_cluster, Fiber{});
  if (copies_put_off.size() < fibers.size() * kMostCopies) copies_put_off.resize(fibers.size() * kMostCopies);
  runnable.clear();
  runnable_head = 0;
  cluster_arrivals = 0;
  std::vector<Block*> mine;
  for (unsigned rank = 0; rank < blocks_in_cluster; ++rank) {
    const unsigned linear = first_block + rank;
    Block* block = new Block{};
    block->index = {linear % grid_dimensions.x, linear / grid_dimensions.x % grid_dimensions.y, linear / (grid_dimensions.x * grid_dimensions.y)};
    block->rank = rank;
    block->running = threads;
    if (bytes_of_shared) {
      void* memory = nullptr;
      if (posix_memalign(&memory, 1024, bytes_of_shared) != 0) throw Error("no memory for the shared memory of a block");
      block->shared = static_cast<unsigned char*>(memory);
      poison(block->shared);
    }
    blocks.push_back(block);
    mine.push_back(block);
  }
  for (unsigned rank = 0; rank < blocks_in_cluster; ++rank)
    for (unsigned t = 0; t < threads; ++t) start(rank * threads + t, mine[rank], t);
  for (unsigned done = 0; done < fibers.size();) {
    if (runnable_head == runnable.size() && !poll()) deadlock();
    const int fiber = next();
    resume(fiber);
    if (!failure.empty()) throw Error(failure);
    if (!fibers[fiber].done) continue;
    ++done;
    Block& block = *fibers[fiber].block;
    if (--block.running == 0 && block.shared != nullptr) poison(block.shared);  // nobody may read it any longer
  }
}

void finish_launch() {
  acquire(&launch_tag);
  for (Block* block : blocks) {
    free(block->shared);
    delete block;
  }
  blocks.clear();
}

}  // namespace

uint3 thread_index() {
  const unsigned i = me().index;
  return {i % block_dimensions.x, i / block_dimensions.x % block_dimensions.y, i / (block_dimensions.x * block_dimensions.y)};
}
uint3 block_index() { return me().block->index; }
dim3 block_size() { return block_dimensions; }
dim3 grid_size() { return grid_dimensions; }
unsigned lane() { return me().index & 31; }
unsigned warp() { return me().index >> 5; }
unsigned cluster_rank() { return me().block->rank; }
unsigned cluster_size() { return blocks_in_cluster; }
unsigned char* shared() { return me().block->shared; }

void* shared_of(const void* mine, unsigned rank) {
  if (rank >= blocks_in_cluster) throw Error("shared memory of block " + std::to_string(rank) + " in a cluster of " + std::to_string(blocks_in_cluster));
  const ptrdiff_t offset = static_cast<const unsigned char*>(mine) - me().block->shared;
  if (offset < 0 || offset >= ptrdiff_t(bytes_of_shared)) throw Error("an address that is not of shared memory, asked for in another block");
  return blocks[blocks.size() - blocks_in_cluster + rank]->shared + offset;
}

void schedule(unsigned seed) {
  shuffles = seed != 0;
  late = seed % 2 == 0;
  favours = shuffles && seed % 3 == 0;
  favourite = seed / 3;
  generator.seed(seed);
}
bool copies_are_late() { return late; }
void put_off(const Copy& copy) {
  Fiber& fiber = me();
  if (fiber.copies == kMostCopies) throw Error("more copies under way than the emulation has room for");
  copies_put_off[current * kMostCopies + (fiber.first_copy + fiber.copies++) % kMostCopies] = {copy, fiber.group};
}
void end_copy_group() { ++me().group; }
bool next_copy(unsigned pending, Copy* copy) {
  Fiber& fiber = me();
  if (fiber.copies == 0) return false;
  const PutOff& oldest = copies_put_off[current * kMostCopies + fiber.first_copy];
  if (oldest.group + pending >= fiber.group) return false;
  *copy = oldest.copy;
  fiber.first_copy = (fiber.first_copy + 1) % kMostCopies;
  --fiber.copies;
  return true;
}
uint64_t switches() { return switch_count; }
Traffic& traffic() { return bytes; }
void count_traffic(uint64_t read, uint64_t written) {
  bytes.read += read;
  bytes.written += written;
}

#ifdef EMULATION_TSAN
void release(const void* tag) { __tsan_release(const_cast<void*>(tag)); }
void acquire(const void* tag) { __tsan_acquire(const_cast<void*>(tag)); }
#else
void release(const void*) {}
void acquire(const void*) {}
#endif

void barrier(unsigned id, unsigned threads, int site) {
  Block& block = *me().block;
  if (id >= kBarriers) throw Error("barrier " + std::to_string(id) + " of 16");
  Barrier& barrier = block.barriers[id];
  if (threads == 0) threads = threads_in_block;
  if (barrier.waiting.empty()) {
    barrier.threads = threads;
    barrier.site = site;
  } else if (barrier.threads != threads || barrier.site != site) {
    throw Error("threads of a block wait at different barriers: lines " + std::to_string(barrier.site) + " and " + std::to_string(site));
  }
  if (id == 0 && threads == threads_in_block && block.running < threads)
    throw Error("a barrier waits for threads that have exited, line " + std::to_string(site));
  release(&barrier.tag);
  if (barrier.waiting.size() + 1 < threads) {
    barrier.waiting.push_back(current);
    sleep("a barrier of the block");
  } else {
    for (int waiting : barrier.waiting) wake(waiting);
    barrier.waiting.clear();
  }
  acquire(&barrier.tag);
}

void cluster_arrive() {
  Fiber& fiber = me();
  if (fiber.cluster_arrived) throw Error("a thread arrives twice at the barrier of its cluster");
  fiber.cluster_arrived = true;
  fiber.cluster_phase = cluster_phase;
  release(&cluster_tag);
  if (++cluster_arrivals == fibers.size()) {
    cluster_arrivals = 0;
    ++cluster_phase;
  }
}

void cluster_wait() {
  Fiber& fiber = me();
  if (!fiber.cluster_arrived) throw Error("a thread waits at the barrier of its cluster without having arrived");
  fiber.cluster_arrived = false;
  wait([](const void* phase) { return *static_cast<const uint64_t*>(phase) != cluster_phase; }, &fiber.cluster_phase, "the barrier of the cluster");
  acquire(&cluster_tag);
}

void collective(unsigned mask, void* operand, Complete complete, bool orders_memory) {
  Fiber& fiber = me();
  const unsigned mine = lane();
  const int first = current - int(mine);
  const unsigned lanes = std::min(32u, threads_in_block - (fiber.index - mine));
  if (!(mask >> mine & 1)) throw Error("lane " + std::to_string(mine) + " calls a collective that its mask leaves out");
  if (lanes < 32 && mask >> lanes) throw Error("a collective names lanes beyond the block");
  fiber.mask = mask;
  fiber.operand = operand;
  fiber.complete = complete;
  fiber.orders_memory = orders_memory;
  char* tag = &fiber.block->warp_tags[warp()];
  if (orders_memory) release(tag);
  void* operands[32] = {};
  bool all = true;
  for (unsigned i = 0; i < lanes; ++i) {
    if (!(mask >> i & 1)) continue;
    const Fiber& other = fibers[first + i];
    if (other.done) throw Error("a collective waits for lane " + std::to_string(i) + ", which has exited");
    operands[i] = other.operand;
    if (i == mine) continue;
    const bool here = other.waiting && other.mask != 0;
    if (here && (mask & other.mask) != 0 && (other.mask != mask || other.complete != complete || other.orders_memory != orders_memory))
      throw Error("lanes of a warp wait at different collectives");
    all &= here;
  }
  if (!all) {
    sleep("a collective of the warp");
  } else {
    if (complete != nullptr) complete(operands);
    for (unsigned i = 0; i < lanes; ++i)
      if (mask >> i & 1) {
        fibers[first + i].mask = 0;
        if (i != mine) wake(first + i);
      }
  }
  if (orders_memory) acquire(tag);
}

namespace {
struct Shuffle {
  uint64_t value, result;
  int source;
};
void exchange(void* const* operands) {
  for (int i = 0; i < 32; ++i) {
    Shuffle* mine = static_cast<Shuffle*>(operands[i]);
    if (mine == nullptr) continue;
    const bool inside = mine->source >= 0 && mine->source < 32;
    if (inside && operands[mine->source] == nullptr) throw Error("a shuffle reads lane " + std::to_string(mine->source) + ", outside of its mask");
    mine->result = inside ? static_cast<const Shuffle*>(operands[mine->source])->value : mine->value;
  }
}
}  // namespace

uint64_t shuffle(unsigned mask, uint64_t value, int source) {
  Shuffle operand{value, 0, source};
  collective(mask, &operand, exchange, false);
  return operand.result;
}

void wait(bool (*ready)(const void*), const void* state, const char* what) {
  if (ready(state)) return;
  me().ready = ready;
  me().state = state;
  sleep(what);
}

void run(dim3 grid, unsigned cluster, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const unsigned count = grid.x * grid.y * grid.z;
  threads_in_block = block.x * block.y * block.z;
  if (threads_in_block == 0 || threads_in_block > 1024) throw Error("a block of " + std::to_string(threads_in_block) + " threads");
  if (cluster == 0 || cluster > 16 || grid.x % cluster) throw Error("a grid of " + std::to_string(grid.x) + " in clusters of " + std::to_string(cluster));
  grid_dimensions = grid;
  block_dimensions = block;
  blocks_in_cluster = cluster;
  bytes_of_shared = shared_bytes;
  kernel = &body;
  stacks_used = 0;
  failure.clear();
  std::vector<unsigned> order;
  for (unsigned first = 0; first < count; first += cluster) order.push_back(first);
  if (shuffles) std::shuffle(order.begin(), order.end(), generator);
#ifdef EMULATION_TSAN
  scheduler_fiber = __tsan_get_current_fiber();
#endif
  try {
    for (unsigned first : order) {
      run_cluster(first);
    }
  } catch (...) {
    finish_launch();
    throw;
  }
  finish_launch();
}

}  // namespace emulation
