// Column-sampled gradients: the kept columns of dz with their weights, the kept rows of a head, and their rows of d_weight added up.
//
// gather_columns  one block to a token and kBlockColumns of the columns, neighbouring threads to neighbouring columns: they write side by
//                 side and read what lies apart, a sector of 32 bytes for each. Bytes asked for: (element + out element) · tokens · kept,
//                 and 12 for each column, token by token.
// gather_rows     one block to a row, 16 bytes a thread and turn where rows begin and end at multiples of 16 bytes, else 2.
// scatter_rows    likewise, of float32: each row is read twice, of both matrices, and written once. No atomics: rows are of different places.
#include "columns.h"

#include "device.cuh"

namespace distill_kernels::cuda {
namespace {

constexpr int kBlockColumns = 2048;

DK_DEVICE float widened(const void* from, Element element, int64_t at) {
  if (element == Element::kFloat32) return load(static_cast<const float*>(from) + at);
  if (element == Element::kBfloat16) return __bfloat162float(load(static_cast<const __nv_bfloat16*>(from) + at));
  return __half2float(load(static_cast<const __half*>(from) + at));
}
DK_DEVICE void write_narrowed(void* to, Element element, int64_t at, float value) {
  if (element == Element::kFloat32) store(static_cast<float*>(to) + at, value);
  else if (element == Element::kBfloat16) store(static_cast<__nv_bfloat16*>(to) + at, __float2bfloat16_rn(value));
  else store(static_cast<__half*>(to) + at, __float2half_rn(value));
}

__global__ void gather_columns_kernel(const __grid_constant__ GatherColumns gather) {
  const int64_t token = blockIdx.y, begin = int64_t(blockIdx.x) * kBlockColumns;
  const int64_t end = begin + kBlockColumns < gather.kept ? begin + kBlockColumns : gather.kept;
  const float divisor = gather.divisor == nullptr ? 1.0f : load(gather.divisor);
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const float dz = widened(gather.dz, gather.dz_element, token * gather.vocabulary + load(gather.columns + i));
    write_narrowed(gather.out, gather.out_element, token * gather.kept + i, dz * (load(gather.weights + i) / divisor));
  }
}

template <class Piece>
__global__ void gather_rows_kernel(const char* matrix, int64_t stride, const int64_t* places, int64_t bytes, char* out) {
  const auto* from = reinterpret_cast<const Piece*>(matrix + load(places + blockIdx.x) * stride);
  auto* to = reinterpret_cast<Piece*>(out + blockIdx.x * bytes);
  for (int64_t i = threadIdx.x; i < bytes / int64_t(sizeof(Piece)); i += blockDim.x) store(to + i, load(from + i));
}

DK_DEVICE float sum(float a, float b) { return a + b; }
DK_DEVICE float4 sum(const float4& a, const float4& b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

template <class Piece>
__global__ void scatter_rows_kernel(float* matrix, const int64_t* places, int64_t dim, const float* rows) {
  auto* to = reinterpret_cast<Piece*>(matrix + load(places + blockIdx.x) * dim);
  const auto* from = reinterpret_cast<const Piece*>(rows + blockIdx.x * dim);
  for (int64_t i = threadIdx.x; i < dim * 4 / int64_t(sizeof(Piece)); i += blockDim.x) store(to + i, sum(load(to + i), load(from + i)));
}

bool in_sixteens(const void* a, const void* b, int64_t stride, int64_t bytes) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | uintptr_t(stride) | uintptr_t(bytes)) % 16 == 0;
}

}  // namespace

void gather_columns(const GatherColumns& gather, int threads, void* stream) {
  const auto blocks = unsigned((gather.kept + kBlockColumns - 1) / kBlockColumns);
  launch(&gather_columns_kernel, dim3(blocks, unsigned(gather.tokens)), 1, dim3(threads), 0, stream, gather);
}

void gather_rows(const void* matrix, int64_t stride, const int64_t* places, int64_t count, int64_t bytes, void* out, int threads, void* stream) {
  const auto kernel = in_sixteens(matrix, out, stride, bytes) ? &gather_rows_kernel<uint4> : &gather_rows_kernel<uint16_t>;
  launch(kernel, dim3(unsigned(count)), 1, dim3(threads), 0, stream, static_cast<const char*>(matrix), stride, places, bytes, static_cast<char*>(out));
}

void scatter_rows(float* matrix, const int64_t* places, int64_t count, int64_t dim, const float* rows, int threads, void* stream) {
  const auto kernel = in_sixteens(matrix, rows, 4 * dim, 4 * dim) ? &scatter_rows_kernel<float4> : &scatter_rows_kernel<float>;
  launch(kernel, dim3(unsigned(count)), 1, dim3(threads), 0, stream, matrix, places, dim, rows);
}

}  // namespace distill_kernels::cuda
