#include "tensor_map.h"

#include <stdexcept>
#include <string>

#include "device.cuh"

namespace distill_kernels::cuda {

#ifdef DK_EMULATED

TensorMap make_tensor_map(const Matrix& matrix, int64_t rows, int64_t elements, int box_rows) {
  const auto* base = static_cast<const unsigned char*>(matrix.data);
  const uint64_t row_bytes = uint64_t(matrix.stride) * 2;
  if (reinterpret_cast<uintptr_t>(base) % 16 || row_bytes % 16) throw emulation::Error("a tensor map of rows not aligned to 16 bytes");
  if (box_rows < 1 || box_rows > 256) throw emulation::Error("a box of " + std::to_string(box_rows) + " rows");
  return {base, uint64_t(elements), uint64_t(rows), row_bytes, uint32_t(box_rows)};
}

#else

namespace {

// By name at run time, so that nothing is linked that a machine without a driver lacks.
auto encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
  constexpr unsigned kSince = 12000;  // of the driver's interface
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, kSince, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess)
    throw std::runtime_error(std::string("the driver makes no tensor maps, which it does from CUDA 12.0 on: ") + cudaGetErrorString(error));
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
}

}  // namespace

TensorMap make_tensor_map(const Matrix& matrix, int64_t rows, int64_t elements, int box_rows) {
  static const auto encode = encoder();
  const auto type = matrix.element == Element::kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[] = {cuuint64_t(elements), cuuint64_t(rows)}, strides[] = {cuuint64_t(matrix.stride) * 2};
  const cuuint32_t box[] = {kBoxElements, cuuint32_t(box_rows)}, steps[] = {1, 1};
  TensorMap map;
  const CUresult result =
      encode(&map, type, 2, const_cast<void*>(matrix.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("the driver refuses a tensor map of " + std::to_string(rows) + " x " + std::to_string(elements) +
                             " elements in rows of " + std::to_string(matrix.stride) + ": error " + std::to_string(int(result)));
  return map;
}

#endif

}  // namespace distill_kernels::cuda
