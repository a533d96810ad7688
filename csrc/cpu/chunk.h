// The CPU kernel of one chunk: hidden states and heads in, per-token terms of the loss and gradients out. See chunk.inc.
#pragma once

#include "../params.h"

namespace distill_kernels {

// `instruction_set` is one of available_instruction_sets(), or null for the widest. False, or −1, if it is not available.
bool run_chunk(const ChunkParams& params, Stage stage, int threads, float* scratch, const char* instruction_set);

// Floats of scratch that run_chunk needs, aligned to 64 bytes. Looks at sizes and at which pointers are null, not at data.
int64_t chunk_scratch_floats(const ChunkParams& params, int threads, const char* instruction_set);

// A head in 8 bits: see Quantised. `scratch`: threads · 2 · its padded dim.
bool quantise_rows(const Matrix& from, int64_t rows, int64_t dim, int8_t* out, float* scales, int threads, float* scratch,
                   const char* instruction_set);

// Names, widest first, ended by null.
const char* const* available_instruction_sets();

// Element-wise exp ('e'), log ('l') or tanh ('t') of an instruction set, so that their error can be tested.
bool run_math_function(char which, const float* in, float* out, int64_t count, const char* instruction_set);

// C ← A · B on the register tiles alone: A (rows, depth), B (depth, 64), C (rows, 64).
bool run_multiply(const float* a, const float* b, float* c, int64_t rows, int64_t depth, const char* instruction_set);

// Floating-point operations a second that one thread reaches in `count` rounds of multiply-adds on registers: the peak. −1 likewise.
double multiply_add_rate(int64_t count, const char* instruction_set);

}  // namespace distill_kernels
