// Tiles of matrices copied into shared memory by sm_90's copy engine, and the barriers by which threads learn that they are there.
//
// A barrier in shared memory has phases. A phase ends when as many arrivals have come as it was made for and all bytes that it was told to
// expect have been copied; a wait is for the end of a phase of a parity, 0 for the first, 1 for the second, 0 for the third. A barrier that
// was just made counts as if a phase of parity 1 had ended, so that a ring of buffers begins with all of them free.
#pragma once

#include "mma.cuh"
#include "tensor_map.h"

namespace distill_kernels::cuda {

using Barrier = uint64_t;

#ifndef DK_EMULATED

DK_DEVICE void make_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Once for all barriers that a thread has made: other blocks of the cluster and the copy engine see them, after a barrier.
DK_DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DK_DEVICE void arrive_and_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// At the barrier of a block of the cluster that lies where `barrier` does in this one. It orders what this thread has done for threads of
// its own block; of what it has read there is nothing left to order, once it has the values.
DK_DEVICE void arrive_at(Barrier* barrier, uint32_t block) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}

DK_DEVICE void wait_for_phase(Barrier* barrier, uint32_t parity) {
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
DK_DEVICE void copy_box(void* to, const TensorMap* map, int element, int row, Barrier* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                   shared_address(to)),
               "l"(map), "r"(element), "r"(row), "r"(shared_address(barrier))
               : "memory");
}

// To the same place in every block of the cluster that `blocks` has a bit of, each of which has its barrier told.
DK_DEVICE void copy_box_to_all(void* to, const TensorMap* map, int element, int row, Barrier* barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(element), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

#else

DK_DEVICE void make_barrier(Barrier* barrier, int arrivals) { emulation::make_barrier(barrier, arrivals); }
DK_DEVICE void publish_barriers() { emulation::publish_barriers(); }
DK_DEVICE void arrive_and_expect(Barrier* barrier, uint32_t bytes) { emulation::arrive(barrier, emulation::cluster_rank(), bytes); }
DK_DEVICE void arrive_at(Barrier* barrier, uint32_t block) { emulation::arrive(barrier, block, 0); }
DK_DEVICE void wait_for_phase(Barrier* barrier, uint32_t parity) { emulation::wait_for_phase(barrier, parity); }
DK_DEVICE void copy_box(void* to, const TensorMap* map, int element, int row, Barrier* barrier) {
  emulation::copy_box(to, map, element, row, barrier, 1u << emulation::cluster_rank());
}
DK_DEVICE void copy_box_to_all(void* to, const TensorMap* map, int element, int row, Barrier* barrier, uint16_t blocks) {
  emulation::copy_box(to, map, element, row, barrier, blocks);
}

#endif

}  // namespace distill_kernels::cuda
