// What a device has room for.
#pragma once

#include <cstddef>
#include <string>

namespace distill_kernels::cuda {

struct Limits {
  int capability;  // 10 · major + minor
  int multiprocessors;
  size_t shared_bytes;  // of a block, if it asks
  unsigned cluster;     // blocks, at most; 1: there are no clusters
  unsigned threads;     // of a row kernel's block
};

// Throws std::runtime_error with the driver's own words.
Limits limits_of(int device);
void use_device(int device);
// In words, or empty: there is one.
std::string why_no_device();

}  // namespace distill_kernels::cuda
