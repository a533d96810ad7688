// What kernels use of the machine: memory, shuffles, clusters, launches. The one file that knows whether nvcc compiles it for a GPU or, with
// DK_EMULATED, a C++ compiler for the emulation that the tests run kernels in.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef DK_EMULATED
#include <instructions.h>
#define DK_DEVICE inline
// Dynamic shared memory, aligned for TMA's widest swizzle. There is no static one.
#define DK_SHARED(name) unsigned char* const name = emulation::shared()
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DK_DEVICE __device__ __forceinline__
#define DK_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

namespace distill_kernels::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// Every read and write of global memory goes through these two, so that the emulation can count bytes and refuse what is not aligned.
template <class T>
DK_DEVICE T load(const T* from) {
#ifdef DK_EMULATED
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) throw emulation::Error("an unaligned read of " + std::to_string(sizeof(T)) + " bytes");
  emulation::count_traffic(sizeof(T), 0);
#endif
  return *from;
}
template <class T>
DK_DEVICE void store(T* to, T value) {
#ifdef DK_EMULATED
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T)) throw emulation::Error("an unaligned write of " + std::to_string(sizeof(T)) + " bytes");
  emulation::count_traffic(0, sizeof(T));
#endif
  *to = value;
}

// Of any struct of 32-bit words, word by word.
template <class T>
DK_DEVICE T shuffle_xor(const T& value, int lanes) {
  static_assert(sizeof(T) % 4 == 0, "shuffles move words");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof value);
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / 4; ++i) words[i] = __shfl_xor_sync(kAllLanes, words[i], lanes);
  T other;
  memcpy(&other, words, sizeof other);
  return other;
}

// Two numbers rounded to 16 bits, the first in the lower half.
template <class T>
DK_DEVICE uint32_t both(T low, T high) {
  uint16_t bits[2];
  memcpy(&bits[0], &low, 2);
  memcpy(&bits[1], &high, 2);
  return uint32_t(bits[1]) << 16 | bits[0];
}
DK_DEVICE uint32_t pair_bfloat16(float low, float high) { return both(__float2bfloat16_rn(low), __float2bfloat16_rn(high)); }
DK_DEVICE uint32_t pair_float16(float low, float high) { return both(__float2half_rn(low), __float2half_rn(high)); }

// A cluster's blocks read each other's shared memory. Before compute capability 9.0 every block is a cluster of its own.
DK_DEVICE unsigned cluster_rank() {
#ifdef DK_EMULATED
  return emulation::cluster_rank();
#elif __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
DK_DEVICE unsigned cluster_size() {
#ifdef DK_EMULATED
  return emulation::cluster_size();
#elif __CUDA_ARCH__ >= 900
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}
// What a thread wrote before it arrives is seen by every thread of the cluster that has waited.
DK_DEVICE void cluster_arrive() {
#ifdef DK_EMULATED
  emulation::cluster_arrive();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
DK_DEVICE void cluster_wait() {
#ifdef DK_EMULATED
  emulation::cluster_wait();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// The same place in the shared memory of another block of the cluster; it has to be read before that block ends.
template <class T>
DK_DEVICE const T* shared_of(const T* mine, unsigned rank) {
#ifdef DK_EMULATED
  return static_cast<const T*>(emulation::shared_of(mine, rank));
#elif __CUDA_ARCH__ >= 900
  const T* theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return theirs;
#else
  return mine;
#endif
}

// A grid in clusters of `cluster` blocks along x. Throws std::runtime_error with the device's own words.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, unsigned cluster, dim3 block, size_t shared_bytes, void* stream, const A&... arguments) {
#ifdef DK_EMULATED
  (void)stream;
  emulation::launch(kernel, grid, cluster, block, shared_bytes, arguments...);
#else
  const auto check = [](cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  };
  constexpr size_t kWithoutAsking = 48 << 10;
  constexpr unsigned kPortableCluster = 8;
  if (shared_bytes > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), "shared memory of a kernel");
  if (cluster > kPortableCluster) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster of a kernel");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, P(arguments)...), "launch of a kernel");
#endif
}

}  // namespace distill_kernels::cuda
