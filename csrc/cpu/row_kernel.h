// The CPU row kernel: two chunks of logits in, per-token terms of the loss and the gradient of the student's logits out.
#pragma once

#include "../params.h"

namespace distill_kernels {

// Runs on the widest instruction set that both the build and this processor have, or on the one named.
// False if `instruction_set` (null: choose) is not in available_instruction_sets().
bool run_row_kernel(const RowParams& params, int threads, const char* instruction_set);

// Names, widest first, ended by null.
const char* const* available_instruction_sets();

// Element-wise exp, log or tanh ('e', 'l', 't') of the named instruction set, so that their error can be tested.
bool run_math_function(char which, const float* in, float* out, int64_t count, const char* instruction_set);

}  // namespace distill_kernels
