// What the copy engine of sm_90 has to know of a matrix, made on the host.
#pragma once

#include "../params.h"

#ifdef DK_EMULATED
#include <hopper.h>
#else
#include <cuda.h>
#endif

namespace distill_kernels::cuda {

#ifdef DK_EMULATED
using TensorMap = emulation::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

constexpr int kBoxElements = 64;  // 128 bytes, the widest swizzle

// Of a matrix (rows, elements) of 16 bits an element, copied in boxes of (box_rows, kBoxElements) that lie swizzled by 128 bytes; what of a
// box lies outside of the matrix is 0. Throws std::runtime_error if the driver has no tensor maps, or refuses this one.
TensorMap make_tensor_map(const Matrix& matrix, int64_t rows, int64_t elements, int box_rows);

}  // namespace distill_kernels::cuda
