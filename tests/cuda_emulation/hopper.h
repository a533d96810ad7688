// What sm_90 adds for a block that feeds its matrix instruction by the copy engine: barriers with transactions, boxes of a tensor map
// copied into the shared memory of a cluster's blocks, and products of a group of four warps. As the PTX ISA has them. Copies happen when
// they are issued or not before somebody waits for them, as `schedule` says; products not before they are waited for, and until then the
// registers that they add to are full of NaN.
#pragma once

#include <algorithm>

#include "cuda_emulation.h"

namespace emulation {

// A row-major matrix of elements of 16 bits that is copied in boxes with rows of 128 bytes, swizzled by 128 bytes.
struct TensorMap {
  const unsigned char* base;
  uint64_t elements, rows, row_bytes;
  uint32_t box_rows;
};
constexpr unsigned kBoxElements = 64, kBoxRowBytes = 128;

// Where the 16 bytes at an address of shared memory lie in memory swizzled by 128 bytes.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }
inline uint32_t shared_offset(const void* of) { return uint32_t(static_cast<const unsigned char*>(of) - shared()); }

// Barriers, in the eight bytes where the kernel has them. A block that makes one forgets what another launch has left under way.
void make_barrier(uint64_t* barrier, unsigned arrivals);
void publish_barriers();
void arrive(uint64_t* barrier, unsigned rank, uint32_t expected_bytes);
void complete(uint64_t* barrier, unsigned rank, uint32_t bytes);

struct BoxCopy {
  const TensorMap* map;
  int element, row;
  uint32_t to, barrier;  // offsets in the shared memory of every block of `ranks`
  uint32_t ranks;
  const void* tag;  // what was released to it when the copy was issued happened before
};
void check_copy(const BoxCopy& copy);
void put_off(const BoxCopy& copy);
// One that was put off and that a barrier of this block waits for; false once the barrier's phase of this parity has ended.
bool next_copy(const uint64_t* barrier, uint32_t parity, BoxCopy* copy);

// By whoever comes to it, so that a race detector sees what is read and written.
inline void perform(const BoxCopy& copy) {
  acquire(copy.tag);
  for (uint32_t rank = 0; rank < cluster_size(); ++rank) {
    if (!(copy.ranks >> rank & 1)) continue;
    auto* memory = static_cast<unsigned char*>(shared_of(shared(), rank));
    for (uint32_t row = 0; row < copy.map->box_rows; ++row)
      for (uint32_t part = 0; part < kBoxRowBytes / 16; ++part) {
        unsigned char bytes[16] = {};
        const int64_t from_row = int64_t(copy.row) + row, from_element = int64_t(copy.element) + part * 8;
        if (from_row < int64_t(copy.map->rows) && from_element < int64_t(copy.map->elements))
          memcpy(bytes, copy.map->base + from_row * copy.map->row_bytes + from_element * 2,
                 2 * std::min<uint64_t>(8, copy.map->elements - from_element));
        memcpy(memory + swizzled(copy.to + row * kBoxRowBytes + part * 16), bytes, sizeof bytes);
      }
    auto* barrier = reinterpret_cast<uint64_t*>(shared() + copy.barrier);
    complete(barrier, rank, copy.map->box_rows * kBoxRowBytes);
  }
}

inline void copy_box(void* to, const TensorMap* map, int element, int row, uint64_t* barrier, uint32_t ranks) {
  const BoxCopy copy{map, element, row, shared_offset(to), shared_offset(barrier), ranks, reinterpret_cast<const char*>(barrier) + 1};
  check_copy(copy);
  release(copy.tag);
  if (copies_are_late()) put_off(copy);
  else perform(copy);
}

inline void wait_for_phase(const uint64_t* barrier, uint32_t parity) {
  BoxCopy copy;
  while (next_copy(barrier, parity, &copy)) perform(copy);
  acquire(barrier);
}

// Products of a group of four warps, m64n128k16.
using Sums = float[16][4];
struct Product {
  Sums* sums;       // the thread's registers, full of NaN until the product is waited for
  Sums* values;     // what they will be
  uint64_t a, b;    // descriptors
  bool adds, bfloat16;
  uint64_t group;
};
void fence_products();
void put_off(Sums& sums, uint64_t a, uint64_t b, bool adds, bool bfloat16);
void commit_products();
// The next product of the running thread that has to be done before at most `pending` groups are under way.
bool next_product(unsigned pending, Product* product);
void finish_product(const Product& product);

inline float widened(uint16_t bits, bool bfloat16) { return bfloat16 ? __bfloat162float({bits}) : __half2float({bits}); }

// 16 elements of a row of a tile, from where the descriptor says.
inline void read_row(uint64_t descriptor, uint32_t row, bool bfloat16, float (&to)[16]) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, eight_rows = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  for (uint32_t part = 0; part < 2; ++part) {
    uint16_t elements[8];
    memcpy(elements, shared() + swizzled(start + row / 8 * eight_rows + row % 8 * kBoxRowBytes + part * 16), sizeof elements);
    for (int i = 0; i < 8; ++i) to[part * 8 + i] = widened(elements[i], bfloat16);
  }
}

inline void perform(const Product& product) {
  const uint32_t lane_row = lane() / 4, first_row = warp() % 4 * 16 + lane_row;
  float a[2][16];
  for (uint32_t half = 0; half < 2; ++half) read_row(product.a, first_row + 8 * half, product.bfloat16, a[half]);
  for (uint32_t n = 0; n < 16; ++n)
    for (uint32_t odd = 0; odd < 2; ++odd) {
      float b[16];
      read_row(product.b, 8 * n + 2 * (lane() % 4) + odd, product.bfloat16, b);
      for (uint32_t half = 0; half < 2; ++half) {
        double sum = 0.0;  // the hardware's own order and width are not documented
        for (int k = 0; k < 16; ++k) sum += double(a[half][k]) * b[k];
        float& value = (*product.values)[n][2 * half + odd];
        value = (product.adds ? value : 0.0f) + float(sum);
      }
    }
  finish_product(product);
}

// The instruction reads for the whole warp: for each of its lanes it has read when it has for all.
inline void wait_for_products(unsigned pending) {
  Product product;
  while (next_product(pending, &product)) perform(product);
  collective(~0u, nullptr, nullptr, true);
}

}  // namespace emulation
