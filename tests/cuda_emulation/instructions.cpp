// Collectives of instructions.h: values move among the operands of a warp's lanes. Not instrumented, for operands are registers.
#include "instructions.h"

namespace emulation {
namespace {

struct Product {
  float* d;
  const uint32_t *a, *b;
};

float widened_bf16(uint16_t bits) { return __bfloat162float({bits}); }
float widened_f16(uint16_t bits) { return __half2float({bits}); }

template <float (*Widened)(uint16_t)>
void multiply(void* const* operands) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<const Product*>(operands[lane]);
    const int group = lane >> 2, pair = (lane & 3) * 2;
    for (int r = 0; r < 4; ++r)
      for (int high = 0; high < 2; ++high)
        a[group + (r & 1) * 8][pair + (r >> 1) * 8 + high] = Widened(uint16_t(mine->a[r] >> 16 * high));
    for (int r = 0; r < 2; ++r)
      for (int high = 0; high < 2; ++high) b[pair + r * 8 + high][group] = Widened(uint16_t(mine->b[r] >> 16 * high));
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<const Product*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = (lane >> 2) + (i >> 1) * 8, column = (lane & 3) * 2 + (i & 1);
      double sum = 0.0;  // the hardware's own order and width are not documented
      for (int k = 0; k < 16; ++k) sum += double(a[row][k]) * b[k][column];
      mine->d[i] += float(sum);
    }
  }
}

struct Rows {
  const uint16_t* row;
  uint32_t* registers;
  unsigned matrices;
};

template <bool Transposed>
void distribute(void* const* operands) {
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<const Rows*>(operands[lane]);
    for (unsigned matrix = 0; matrix < mine->matrices; ++matrix) {
      uint32_t both = 0;
      for (int high = 0; high < 2; ++high) {
        const int along = (lane & 3) * 2 + high, across = lane >> 2;
        const int row = Transposed ? along : across, column = Transposed ? across : along;
        both |= uint32_t(static_cast<const Rows*>(operands[matrix * 8 + row])->row[column]) << 16 * high;
      }
      mine->registers[matrix] = both;
    }
  }
}

}  // namespace

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Product product{d, a, b};
  collective(~0u, &product, multiply<widened_bf16>, false);
}
void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Product product{d, a, b};
  collective(~0u, &product, multiply<widened_f16>, false);
}

void distribute_matrices(unsigned matrices, const uint4& row, bool transposed, uint32_t* registers) {
  uint16_t elements[8];
  memcpy(elements, &row, sizeof elements);
  Rows rows{elements, registers, matrices};
  collective(~0u, &rows, transposed ? distribute<true> : distribute<false>, false);
}

}  // namespace emulation
