// CUDA C++ kernels compiled by g++ and run on the CPU: the language of a .cu file without nvcc, and the scheduler's interface.
//
// Every CUDA thread is a fiber. The blocks of a cluster run together, clusters one after another, in launch order or in one drawn from a
// seed. Only barriers order memory between threads, so a race detector sees what a GPU would race on; a collective whose lanes do not all
// come, a barrier that some threads leave out, and threads that wait for nobody are errors in words.
//
// A kernel takes shared memory from emulation::shared() (dynamic, full of NaN when a block starts and when it ends), is launched by
// emulation::launch, and reports what it asks of global memory to emulation::traffic(). Asynchronous copies happen either when they are
// issued or as late as they may: what a program reads too early, or overwrites too early, is wrong in one of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
using std::max;
using std::min;

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 from) {
  const uint32_t bits = uint32_t(from.bits) << 16;
  float to;
  memcpy(&to, &bits, sizeof to);
  return to;
}
inline __nv_bfloat16 __float2bfloat16_rn(float from) {
  uint32_t bits;
  memcpy(&bits, &from, sizeof bits);
  if (std::isnan(from)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
struct __half {
  uint16_t bits;
};
inline float __half2float(__half from) {
  _Float16 narrow;
  memcpy(&narrow, &from.bits, sizeof narrow);
  return float(narrow);
}
inline __half __float2half_rn(float from) {
  const _Float16 narrow = _Float16(from);
  __half to;
  memcpy(&to.bits, &narrow, sizeof to.bits);
  return to;
}

namespace emulation {

// Memory that a race detector hears nothing of: what one thread of the emulation allocates another may free.
extern "C" void* __libc_malloc(size_t);
extern "C" void __libc_free(void*);
template <class T>
struct Unheard {
  using value_type = T;
  Unheard() = default;
  template <class U>
  Unheard(const Unheard<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(__libc_malloc(count * sizeof(T))); }
  void deallocate(T* memory, size_t) { __libc_free(memory); }
  bool operator==(const Unheard&) const { return true; }
  bool operator!=(const Unheard&) const { return false; }
};

struct Error : std::runtime_error {
  using runtime_error::runtime_error;
};

// Where the running thread is.
uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned lane();
unsigned warp();  // within the block
unsigned cluster_rank();
unsigned cluster_size();
unsigned char* shared();
// The same place in the shared memory of another block of the cluster.
void* shared_of(const void* mine, unsigned rank);

// 0: threads, blocks and late copies in the order of the program. Otherwise drawn from the seed; of an odd one copies happen early, and of a
// multiple of 3 one block of a cluster, the (seed / 3)-th, always goes first: it ends while others still want something of it.
void schedule(unsigned seed);
bool copies_are_late();
uint64_t switches();

struct Traffic {
  uint64_t read, written;  // bytes that kernels asked of global memory
};
Traffic& traffic();
void count_traffic(uint64_t read, uint64_t written);

// Barrier `id` of the block for `threads` of its threads (0: all); `site` of all of them has to be the same.
void barrier(unsigned id, unsigned threads, int site);
void cluster_arrive();
void cluster_wait();

// All lanes of `mask` come with an operand each, of one address space; the last calls `complete` with all 32 (null: not in the mask), which
// moves values among them and touches no other memory. `orders_memory`: a __syncwarp among them.
using Complete = void (*)(void* const* operands);
void collective(unsigned mask, void* operand, Complete complete, bool orders_memory);

// Sleeps until ready(state), which is asked again whenever no other thread can run; `what` is for the error of a deadlock. With `release`
// and `acquire` a primitive that is built on it says what orders memory: all that was released to a tag is seen by who acquires it.
void wait(bool (*ready)(const void*), const void* state, const char* what);
void release(const void* tag);
void acquire(const void* tag);

void run(dim3 grid, unsigned cluster, dim3 block, size_t shared_bytes, const std::function<void()>& body);

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, unsigned cluster, dim3 block, size_t shared_bytes, const A&... arguments) {
  run(grid, cluster, block, shared_bytes, [&] { kernel(P(arguments)...); });  // parameters are copied for each thread
}

uint64_t shuffle(unsigned mask, uint64_t value, int source);  // a source beyond the warp: one's own

template <class T>
T shuffled(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 32 or 64 bits");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, source);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

#define threadIdx emulation::thread_index()
#define blockIdx emulation::block_index()
#define blockDim emulation::block_size()
#define gridDim emulation::grid_size()
#define __syncthreads() emulation::barrier(0, 0, __LINE__)

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::collective(mask, nullptr, nullptr, true); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::shuffled(mask, value, source & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::shuffled(mask, value, int(emulation::lane()) ^ lanes);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes) {
  return emulation::shuffled(mask, value, int(emulation::lane()) + lanes);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned ballot = 0;
  for (int source = 0; source < 32; ++source)
    if (mask >> source & 1) ballot |= unsigned(emulation::shuffled(mask, predicate != 0, source)) << source;
  return ballot;
}
inline bool __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
