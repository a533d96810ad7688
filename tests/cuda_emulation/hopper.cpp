// The state behind hopper.h. Not instrumented, as scheduler.cpp is not.
#include "hopper.h"

#include <deque>
#include <memory>
#include <vector>

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

// What a block has under way, and whether others may use its barriers.
struct Thread {
  struct Registers {
    Sums* sums;
    std::unique_ptr<Sums[]> values;
    unsigned under_way;
  };
  std::deque<Product> products;
  std::vector<Registers> registers;
  uint64_t group = 0;
  bool fenced = false;
};
struct BlockState {
  bool published = false;
  Thread threads[1024];
};
std::vector<std::unique_ptr<BlockState>> states;
std::vector<BoxCopy> copies_put_off;

BlockState& state_of(unsigned rank) {
  while (states.size() <= rank) states.push_back(std::make_unique<BlockState>());
  return *states[rank];
}
Thread& this_thread() { return state_of(cluster_rank()).threads[warp() * 32 + lane()]; }

void update(uint64_t* barrier, unsigned rank, bool arrives, int64_t bytes) {
  auto* there = static_cast<uint64_t*>(shared_of(barrier, rank));
  State state = read(there);
  if (rank != cluster_rank() && !state_of(rank).published) throw Error("a barrier of another block that it has not published");
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
  BlockState& block = state_of(cluster_rank());
  if (block.published) {  // by the kernel before this one
    for (Thread& thread : block.threads) thread = Thread{};
    copies_put_off.clear();
    block.published = false;
  }
  State state{};
  state.made = int16_t(kMade);
  state.expected = state.pending = arrivals;
  memcpy(barrier, &state, sizeof state);
}

void publish_barriers() { state_of(cluster_rank()).published = true; }

void arrive(uint64_t* barrier, unsigned rank, uint32_t expected_bytes) {
  release(shared_of(barrier, rank));
  update(barrier, rank, true, expected_bytes);
}

void complete(uint64_t* barrier, unsigned rank, uint32_t bytes) { update(barrier, rank, false, -int64_t(bytes)); }

bool phase_has_ended(const uint64_t* barrier, uint32_t parity) { return (read(barrier).phase != 0) != (parity != 0); }

void check_copy(const BoxCopy& copy) {
  if (!state_of(cluster_rank()).published) throw Error("a copy that completes at a barrier which the copy engine was not told of");
  if (copy.to % 128) throw Error("a box at an address of shared memory that is not a multiple of 128");
  if (copy.ranks == 0 || copy.ranks >> cluster_size()) throw Error("a box for blocks that are not of the cluster");
  const auto inside = [](int64_t first, int64_t size, int64_t all) { return std::max<int64_t>(0, std::min(first + size, all) - first); };
  traffic().read += 2 * inside(copy.row, copy.map->box_rows, copy.map->rows) * inside(copy.element, kBoxElements, copy.map->elements);
}

void put_off(const BoxCopy& copy) { copies_put_off.push_back(copy); }

namespace {
size_t find_copy(uint32_t barrier, unsigned rank) {
  size_t i = 0;
  while (i < copies_put_off.size() && !(copies_put_off[i].barrier == barrier && copies_put_off[i].ranks >> rank & 1)) ++i;
  return i;
}
}  // namespace

bool has_copy(uint32_t barrier, unsigned rank) { return find_copy(barrier, rank) < copies_put_off.size(); }

bool take_copy(uint32_t barrier, unsigned rank, BoxCopy* copy) {
  const size_t i = find_copy(barrier, rank);
  if (i == copies_put_off.size()) return false;
  *copy = copies_put_off[i];
  copies_put_off.erase(copies_put_off.begin() + i);
  return true;
}

void fence_products() { this_thread().fenced = true; }

void put_off(Sums& sums, uint64_t a, uint64_t b, bool adds, bool bfloat16) {
  Thread& thread = this_thread();
  if (!thread.fenced) throw Error("a product into registers that no fence has handed over");
  if ((a >> 62) != 1 || (b >> 62) != 1) throw Error("a tile that is not swizzled by 128 bytes");
  for (uint64_t descriptor : {a, b})
    if (shuffle(~0u, descriptor, 0) != descriptor) throw Error("lanes of a warp multiply different tiles");
  Thread::Registers* registers = nullptr;
  for (auto& candidate : thread.registers)
    if (candidate.sums == &sums) registers = &candidate;
  if (registers == nullptr) {
    thread.registers.push_back({&sums, std::unique_ptr<Sums[]>(new Sums[1]), 0});
    registers = &thread.registers.back();
  }
  if (registers->under_way++ == 0) {
    memcpy(registers->values[0], sums, sizeof sums);
    for (auto& fragment : sums)
      for (float& sum : fragment) sum = NAN;
  }
  thread.products.push_back({&sums, &registers->values[0], a, b, adds, bfloat16, thread.group});
}

void commit_products() { ++this_thread().group; }

bool next_product(unsigned pending, Product* product) {
  Thread& thread = this_thread();
  if (thread.products.empty() || thread.products.front().group + pending >= thread.group) {
    thread.fenced &= !thread.products.empty();  // the threads may touch their registers now
    return false;
  }
  *product = thread.products.front();
  thread.products.pop_front();
  return true;
}

void finish_product(const Product& product) {
  Thread& thread = this_thread();
  for (size_t i = 0; i < thread.registers.size(); ++i) {
    auto& registers = thread.registers[i];
    if (registers.sums != product.sums || --registers.under_way != 0) continue;
    memcpy(*product.sums, registers.values[0], sizeof(Sums));
    thread.registers.erase(thread.registers.begin() + i);
    return;
  }
}

}  // namespace emulation
