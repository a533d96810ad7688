// The state behind hopper.h. Not instrumented, as scheduler.cpp is not.
#include "hopper.h"

namespace emulation {
namespace {

constexpr uint16_t kMade = 0xba55;
struct State {
  int64_t made : 16, phase : 2, expected : 11, pending : 11, bytes : 24;
};
static_assert(sizeof(State) == sizeof(uint64_t), "a barrier has eight bytes");

State read(const uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8) throw Error("a barrier at an address that is not a multiple of 8");
  State state;
  memcpy(&state, barrier, sizeof state);
  if (uint16_t(state.made) != kMade) throw Error("a barrier that was not made");
  return state;
}

// All of it in place: a race detector hears of memory that one thread allocates and another frees.
constexpr unsigned kMostProducts = 64, kMostCopies = 256, kMostRegisters = 4, kMostBlocks = 16, kMostThreads = 1024;

struct Thread {
  struct Registers {
    Sums* sums;  // null: free
    Sums values;
    unsigned under_way;
  };
  Product products[kMostProducts];  // a ring
  unsigned first, count;
  Registers registers[kMostRegisters];
  uint64_t group;
  bool fenced;
};
struct BlockState {
  bool published;  // others may use its barriers
  Thread threads[kMostThreads];
};
BlockState states[kMostBlocks];
BoxCopy copies_put_off[kMostCopies];
unsigned copy_count = 0;

BlockState& this_block() { return states[cluster_rank()]; }
Thread& this_thread() { return this_block().threads[warp() * 32 + lane()]; }

bool phase_has_ended(const uint64_t* barrier, uint32_t parity) { return (read(barrier).phase != 0) != (parity != 0); }

unsigned find_copy(uint32_t barrier, unsigned rank) {
  unsigned i = 0;
  while (i < copy_count && !(copies_put_off[i].barrier == barrier && copies_put_off[i].ranks >> rank & 1)) ++i;
  return i;
}

void update(uint64_t* barrier, unsigned rank, bool arrives, int64_t bytes) {
  auto* there = static_cast<uint64_t*>(shared_of(barrier, rank));
  State state = read(there);
  if (rank != cluster_rank() && !states[rank].published) throw Error("a barrier of another block that it has not published");
  if (arrives && state.pending == 0) throw Error("more arrivals at a barrier than it was made for");
  state.pending -= arrives;
  state.bytes += bytes;
  if (state.pending == 0 && state.bytes == 0) {
    state.phase = !state.phase;
    state.pending = state.expected;
  }
  memcpy(there, &state, sizeof state);
  release(there);
}

}  // namespace

void make_barrier(uint64_t* barrier, unsigned arrivals) {
  if (arrivals == 0 || arrivals > 1000) throw Error("a barrier for " + std::to_string(arrivals) + " arrivals");
  if (reinterpret_cast<uintptr_t>(barrier) % 8) throw Error("a barrier at an address that is not a multiple of 8");
  BlockState& block = this_block();
  if (block.published) {  // by the kernel before this one
    for (Thread& thread : block.threads) {
      thread.first = thread.count = 0;
      thread.group = 0;
      thread.fenced = false;
      for (auto& registers : thread.registers) registers.sums = nullptr;
    }
    copy_count = 0;
    block.published = false;
  }
  State state{};
  state.made = int16_t(kMade);
  state.expected = state.pending = arrivals;
  memcpy(barrier, &state, sizeof state);
}

void publish_barriers() { this_block().published = true; }

void arrive(uint64_t* barrier, unsigned rank, uint32_t expected_bytes) {
  release(shared_of(barrier, rank));
  update(barrier, rank, true, expected_bytes);
}

void complete(uint64_t* barrier, unsigned rank, uint32_t bytes) { update(barrier, rank, false, -int64_t(bytes)); }

void check_copy(const BoxCopy& copy) {
  if (!this_block().published) throw Error("a copy that completes at a barrier which the copy engine was not told of");
  if (copy.to % 128) throw Error("a box at an address of shared memory that is not a multiple of 128");
  if (copy.ranks == 0 || copy.ranks >> cluster_size()) throw Error("a box for blocks that are not of the cluster");
  const auto inside = [](int64_t first, int64_t size, int64_t all) { return std::max<int64_t>(0, std::min(first + size, all) - first); };
  traffic().read += 2 * inside(copy.row, copy.map->box_rows, copy.map->rows) * inside(copy.element, kBoxElements, copy.map->elements);
}

void put_off(const BoxCopy& copy) {
  if (copy_count == kMostCopies) throw Error("more copies under way than the emulation has room for");
  copies_put_off[copy_count++] = copy;
}

bool next_copy(const uint64_t* barrier, uint32_t parity, BoxCopy* copy) {
  struct Awaited {
    const uint64_t* barrier;
    uint32_t parity, offset, rank;
  };
  const Awaited awaited{barrier, parity, shared_offset(barrier), cluster_rank()};
  wait(
      [](const void* state) {
        const auto* which = static_cast<const Awaited*>(state);
        return phase_has_ended(which->barrier, which->parity) || find_copy(which->offset, which->rank) < copy_count;
      },
      &awaited, parity ? "a barrier, for a phase of parity 1" : "a barrier, for a phase of parity 0");
  if (phase_has_ended(barrier, parity)) return false;
  const unsigned i = find_copy(awaited.offset, awaited.rank);
  if (i == copy_count) return next_copy(barrier, parity, copy);  // another thread was here first
  *copy = copies_put_off[i];
  for (unsigned after = i + 1; after < copy_count; ++after) copies_put_off[after - 1] = copies_put_off[after];
  --copy_count;
  return true;
}

void fence_products() { this_thread().fenced = true; }

void put_off(Sums& sums, uint64_t a, uint64_t b, bool adds, bool bfloat16) {
  Thread& thread = this_thread();
  if (!thread.fenced) throw Error("a product into registers that no fence has handed over");
  if ((a >> 62) != 1 || (b >> 62) != 1) throw Error("a tile that is not swizzled by 128 bytes");
  for (uint64_t descriptor : {a, b})
    if (shuffle(~0u, descriptor, 0) != descriptor) throw Error("lanes of a warp multiply different tiles");
  Thread::Registers *registers = nullptr, *free = nullptr;
  for (auto& candidate : thread.registers) {
    if (candidate.sums == &sums) registers = &candidate;
    if (candidate.sums == nullptr) free = &candidate;
  }
  if (registers == nullptr) {
    if (free == nullptr) throw Error("more products under way than the emulation has room for");
    registers = free;
    registers->sums = &sums;
    registers->under_way = 0;
    memcpy(registers->values, sums, sizeof sums);
    for (auto& fragment : sums)
      for (float& sum : fragment) sum = NAN;
  }
  if (thread.count == kMostProducts) throw Error("more products under way than the emulation has room for");
  ++registers->under_way;
  thread.products[(thread.first + thread.count++) % kMostProducts] = {&sums, &registers->values, a, b, adds, bfloat16, thread.group};
}

void commit_products() { ++this_thread().group; }

bool next_product(unsigned pending, Product* product) {
  Thread& thread = this_thread();
  if (thread.count == 0) thread.fenced = false;  // the threads may touch their registers now
  if (thread.count == 0 || thread.products[thread.first].group + pending >= thread.group) return false;
  *product = thread.products[thread.first];
  thread.first = (thread.first + 1) % kMostProducts;
  --thread.count;
  return true;
}

void finish_product(const Product& product) {
  for (auto& registers : this_thread().registers) {
    if (registers.sums != product.sums || --registers.under_way != 0) continue;
    memcpy(*product.sums, registers.values, sizeof(Sums));
    registers.sums = nullptr;
  }
}

}  // namespace emulation
