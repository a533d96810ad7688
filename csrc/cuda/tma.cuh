// Tiles of matrices copied into shared memory by sm_90's copy engine, and the barriers by which threads learn that they are there.
//
// A barrier in shared memory has phases. A phase ends when as many arrivals have come as it was made for and all bytes that it was told to
// expect have been copied; a wait is for the end of a phase of a parity, 0 for the first, 1 for the second, 0 for the third. A barrier that
// was just made counts as if a phase of parity 1 had ended, so that a ring of buffers begins with all of them free.
#pragma once

#include "device.cuh"

namespace distill_kernels {

#ifdef __CUDACC__

using Barrier = uint64_t;

__device__ __forceinline__ void make_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Once for all barriers that a thread has made: other blocks of the cluster and the copy engine see them, after `cluster_barrier`.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive_and_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// At the barrier of a block of the cluster that lies where `barrier` does in this one.
__device__ __forceinline__ void arrive_at(Barrier* barrier, uint32_t block) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}

__device__ __forceinline__ void wait_for_phase(Barrier* barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.b32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (ended == 0);
}

// The box of `map` at an element of a row, to shared memory; what lies outside of the matrix is 0, and counts as copied all the same.
__device__ __forceinline__ void copy_box(void* to, const TensorMap* map, int element, int row, Barrier* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                   shared_address(to)),
               "l"(map), "r"(element), "r"(row), "r"(shared_address(barrier))
               : "memory");
}

// To the same place in every block of the cluster that `blocks` has a bit of, each of which has its barrier told.
__device__ __forceinline__ void copy_box_to_all(void* to, const TensorMap* map, int element, int row, Barrier* barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(element), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

#else
#include "hopper_barriers.inc"
#endif

}  // namespace distill_kernels
