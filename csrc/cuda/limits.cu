// Asked of the runtime, which finds the driver when it is first called.
#include "limits.h"

#include "device.cuh"
#include "rows.h"

namespace distill_kernels::cuda {

#ifdef DK_EMULATED

// Little shared memory, so that a row of a few hundred entries takes a cluster and one of a few thousand is not held.
Limits limits_of(int) { return {90, 7, kRowBoardBytes + kRowEdgeBytes + 40 * 32, 16, 64}; }
void use_device(int) {}
std::string why_no_device() { return ""; }

#else

namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "attribute of the device");
  return value;
}

}  // namespace

Limits limits_of(int device) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device), minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  Limits limits{};
  limits.capability = 10 * major + minor;
  limits.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.shared_bytes = size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  limits.cluster = major < 9 ? 1 : 8;  // 16 are not promised by every device that has clusters
  limits.threads = kMostRowThreads;
  return limits;
}

void use_device(int device) { check(cudaSetDevice(device), "choice of the device"); }

std::string why_no_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count > 0 ? "" : "there is none";
}

#endif

}  // namespace distill_kernels::cuda
