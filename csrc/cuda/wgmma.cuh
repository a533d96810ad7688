// The matrix instruction of sm_90: a group of four warps multiplies two tiles that lie in shared memory, without waiting for the product.
//
// Tiles have rows of 128 bytes, 64 elements along the dimension that is summed over, and begin at multiples of 1024 bytes; the 16-byte
// parts of row r lie at part ^ (r % 8), as the copy engine puts them there with a swizzle of 128 bytes.
#pragma once

#include "mma.cuh"

namespace distill_kernels::cuda {

constexpr int kWgmmaRows = 64, kWgmmaColumns = 128, kWgmmaDepth = 16;
constexpr int kWgmmaFragments = kWgmmaColumns / 8;

#ifdef DK_EMULATED
DK_DEVICE uint32_t shared_address(const void* of) { return emulation::shared_offset(of); }
#endif

// Where a tile begins, in sixteens of bytes; rows 8 further on lie 1024 bytes further on; swizzled by 128 bytes. What lies n elements
// further on in every row of the tile is the operand whose descriptor is n / 8 more.
DK_DEVICE uint64_t tile_descriptor(const void* tile) {
  return uint64_t((shared_address(tile) & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Of as many threads of the block as are named, all of whole warps.
template <int THREADS>
DK_DEVICE void barrier_of_threads() {
#ifdef DK_EMULATED
  emulation::barrier(1, THREADS, __LINE__);
#else
  asm volatile("barrier.sync 1, %0;" ::"n"(THREADS) : "memory");
#endif
}

#ifndef DK_EMULATED

// Before the first product that adds to registers which the threads have touched since.
DK_DEVICE void fence_sums() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DK_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most PENDING groups of products are on their way.
template <int PENDING>
DK_DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// What is computed from sums stays behind a wait before it: to the compiler a wait has nothing to do with them.
DK_DEVICE void hold(Fragment (&sums)[kWgmmaFragments]) {
#pragma unroll
  for (auto& fragment : sums)
#pragma unroll
    for (float& sum : fragment) asm volatile("" : "+f"(sum)::"memory");
}

// Registers of each thread of a group of four warps from here on. All of a branch by which the roles of the groups part.
template <int COUNT>
DK_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
DK_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

#define DK_SUMS(i) "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])
#define DK_WGMMA(TYPE)                                                                                                             \
  asm volatile(                                                                                                                    \
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"                                                                           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, " \
      "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "   \
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, adds, 1, 1, 0, 0;\n}"                      \
      : DK_SUMS(0), DK_SUMS(1), DK_SUMS(2), DK_SUMS(3), DK_SUMS(4), DK_SUMS(5), DK_SUMS(6), DK_SUMS(7), DK_SUMS(8), DK_SUMS(9),    \
        DK_SUMS(10), DK_SUMS(11), DK_SUMS(12), DK_SUMS(13), DK_SUMS(14), DK_SUMS(15)                                               \
      : "l"(a), "l"(b), "r"(int(adds)))

// sums = (adds ? sums : 0) + a · bᵀ: 64 rows of a, 128 rows of b, 16 elements of each. Of the sums a thread has rows lane / 4 and
// lane / 4 + 8 of its warp's 16.
template <Element ELEMENT>
DK_DEVICE void multiply_tiles(Fragment (&sums)[kWgmmaFragments], uint64_t a, uint64_t b, bool adds) {
  static_assert(ELEMENT == Element::kBfloat16 || ELEMENT == Element::kFloat16, "elements of 16 bits");
  if constexpr (ELEMENT == Element::kBfloat16) {
    DK_WGMMA("bf16");
  } else {
    DK_WGMMA("f16");
  }
}
#undef DK_WGMMA
#undef DK_SUMS

#else

DK_DEVICE void fence_sums() { emulation::fence_products(); }
DK_DEVICE void commit_products() { emulation::commit_products(); }
template <int PENDING>
DK_DEVICE void wait_for_products() {
  emulation::wait_for_products(PENDING);
}
DK_DEVICE void hold(Fragment (&)[kWgmmaFragments]) {}
template <int COUNT>
DK_DEVICE void fewer_registers() {}
template <int COUNT>
DK_DEVICE void more_registers() {}
template <Element ELEMENT>
DK_DEVICE void multiply_tiles(Fragment (&sums)[kWgmmaFragments], uint64_t a, uint64_t b, bool adds) {
  emulation::put_off(sums, a, b, adds, ELEMENT == Element::kBfloat16);
}

#endif

}  // namespace distill_kernels::cuda
