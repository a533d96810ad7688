// PTX instructions that kernels reach by inline assembly: the tensor cores' mma.sync with its ldmatrix, and cp.async.
#pragma once

#include "cuda_emulation.h"

namespace emulation {

// mma.sync.aligned.m16n8k16.row.col.f32: d (16, 8) += a (16, 16) · bᵀ, fragments laid out over the lanes as the PTX ISA has them.
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// Hands (8, 8) matrices of 16-bit elements out to the lanes: `row` is what this lane has read of the memory of all of them.
void distribute_matrices(unsigned matrices, const uint4& row, bool transposed, uint32_t* registers);

// ldmatrix.sync.aligned.m8n8.x{1,2,4}[.trans].shared.b16: lane i gives the address of row i % 8 of matrix i / 8.
template <unsigned Matrices>
void ldmatrix(uint32_t (&registers)[Matrices], const void* row_address, bool transposed = false) {
  static_assert(Matrices == 1 || Matrices == 2 || Matrices == 4, "ldmatrix reads 1, 2 or 4 matrices");
  uint4 row{};
  if (lane() < 8 * Matrices) {
    if (reinterpret_cast<uintptr_t>(row_address) % 16) throw Error("ldmatrix of a row that is not aligned to 16 bytes");
    memcpy(&row, row_address, sizeof row);  // by the lane itself, so that a race detector sees who reads
  }
  distribute_matrices(Matrices, row, transposed, registers);
}

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, read;  // what is not read is written as zeros
};
// Of the running thread: puts a copy of its present group off; ends that group; the oldest copy that has to be done before at most `pending`
// of its groups are under way.
void put_off(const Copy& copy);
void end_copy_group();
bool next_copy(unsigned pending, Copy* copy);

inline void perform(const Copy& copy) {
  unsigned char all[16] = {};
  memcpy(all, copy.from, copy.read);
  memcpy(copy.to, all, copy.bytes);
}

// cp.async of 4, 8 or 16 bytes from global to shared memory; `read` of them are read and the rest are zeros.
inline void cp_async(void* to, const void* from, unsigned bytes, unsigned read) {
  if (bytes != 4 && bytes != 8 && bytes != 16) throw Error("cp.async of " + std::to_string(bytes) + " bytes");
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) throw Error("cp.async of an unaligned address");
  count_traffic(read, 0);
  const Copy copy{to, from, bytes, read};
  if (copies_are_late()) put_off(copy);
  else perform(copy);
}
inline void cp_async_commit() { end_copy_group(); }
// Until at most `pending` of the groups committed last are under way. The copies are seen by this thread only, until a barrier.
inline void cp_async_wait(unsigned pending) {
  Copy copy;
  while (next_copy(pending, &copy)) perform(copy);
}

}  // namespace emulation
