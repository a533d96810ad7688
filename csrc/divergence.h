// What the generated divergence functors stand on, for any element type: float on a GPU, a vector of floats on a CPU.
#pragma once

#if defined(__CUDACC__)
#define DK_INLINE __host__ __device__ __forceinline__
#else
#define DK_INLINE inline __attribute__((always_inline))
#endif

namespace distill_kernels {

template <class T>
struct ValueSlope {
  T value;  // of one vocabulary entry, Σ over entries is the divergence
  T slope;  // ∂value / ∂log q of that entry
};

}  // namespace distill_kernels
