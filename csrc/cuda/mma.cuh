// The matrix instructions of sm_80 and later chips, and what feeds them: copies of 16 bytes into shared memory that the threads do not wait
// for, matrices of 8 x 8 from shared memory into registers, products of 16 x 8 x 16 by a warp.
#pragma once

#include "../params.h"
#include "device.cuh"

namespace distill_kernels::cuda {

// Floats of a thread for a product of a warp: of rows lane / 4 and lane / 4 + 8, two neighbouring columns each, from 2 · (lane % 4) on.
// `multiply_tiles` of wgmma.cuh has eight columns to a fragment, too.
using Fragment = float[4];

#ifndef DK_EMULATED

DK_DEVICE uint32_t shared_address(const void* of) { return uint32_t(__cvta_generic_to_shared(of)); }

// 16 bytes at `from` to shared memory, or zeros where it is not `inside`; the threads that need them wait for the group.
DK_DEVICE void copy_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

DK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most PENDING of this thread's groups are under way. Other threads see the copies after a barrier.
template <int PENDING>
DK_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four matrices of 8 x 8 elements of 16 bits; lane l passes row l % 8 of matrix l / 8, and gets two elements of row l / 4 of each.
DK_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

#define DK_MMA(TYPE)                                                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, " \
               "{%8, %9}, {%0, %1, %2, %3};"                                                                      \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// sum += a (16 x 16) · bᵀ (16 x 8), both of 16-bit floating-point elements.
template <Element ELEMENT>
DK_DEVICE void multiply_add(Fragment& sum, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(ELEMENT == Element::kBfloat16 || ELEMENT == Element::kFloat16, "elements of 16 bits");
  if constexpr (ELEMENT == Element::kBfloat16) {
    DK_MMA("bf16");
  } else {
    DK_MMA("f16");
  }
}
#undef DK_MMA

#else

DK_DEVICE void copy_async(void* to, const void* from, bool inside) { emulation::cp_async(to, from, 16, inside ? 16 : 0); }
DK_DEVICE void commit_copies() { emulation::cp_async_commit(); }
template <int PENDING>
DK_DEVICE void wait_for_copies() {
  emulation::cp_async_wait(PENDING);
}
DK_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) { emulation::ldmatrix<4>(to, row); }
template <Element ELEMENT>
DK_DEVICE void multiply_add(Fragment& sum, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (ELEMENT == Element::kBfloat16) {
    emulation::mma_m16n8k16_bf16(sum, a, b);
  } else {
    emulation::mma_m16n8k16_f16(sum, a, b);
  }
}

#endif

}  // namespace distill_kernels::cuda
