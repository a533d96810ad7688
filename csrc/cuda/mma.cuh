// The matrix instructions of sm_80 and later chips, and what feeds them: copies of 16 bytes into shared memory that the threads do not wait
// for, matrices of 8 x 8 from shared memory into registers, products of 16 x 8 x 16 by a warp.
#pragma once

#include "../params.h"
#include "device.cuh"

namespace distill_kernels {

// Floats of a thread for a product of a warp: of rows lane / 4 and lane / 4 + 8, two neighbouring columns each, from 2 * (lane % 4) on.
// `wgmma` has eight such columns to a group of four floats, too.
using Fragment = float[4];

// 16 bytes at `from` to shared memory, or zeros where it is not `inside`; the threads that need them wait for the group.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most PENDING of this thread's groups are on their way.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four matrices of 8 x 8 elements of 16 bits; lane l passes the row l % 8 of matrix l / 8, and gets two elements of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum += a (16 x 16) · b (16 x 8), both of 16-bit floating-point elements.
template <Element ELEMENT>
__device__ __forceinline__ void multiply_add(Fragment& sum, const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
#define DK_MMA(TYPE)                                                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, " \
               "{%8, %9}, {%0, %1, %2, %3};"                                                                      \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high))
  static_assert(ELEMENT == Element::kBfloat16 || ELEMENT == Element::kFloat16, "elements of 16 bits");
  if constexpr (ELEMENT == Element::kBfloat16) {
    DK_MMA("bf16");
  } else {
    DK_MMA("f16");
  }
#undef DK_MMA
}

}  // namespace distill_kernels
