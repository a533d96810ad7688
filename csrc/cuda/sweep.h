// The tile-fused sweep, for the host: what it reads, what it needs of memory, and its launches.
#pragma once

#include "../params.h"
#include "loss.h"

namespace distill_kernels::cuda {

// By which matrix instructions: mma.sync of sm_80 and every later chip, or wgmma of sm_90a alone.
enum class Instructions : int { kMma, kWgmma };

constexpr int kSweepRows = 128;     // tokens of a block
constexpr int kSweepEntries = 128;  // of the vocabulary, that a block takes at a time

// One model's product: hidden states (tokens, dim) with a head (vocabulary, dim), elements of 16 bits. Rows begin at multiples of 16 bytes,
// and so `dim` is a multiple of 8.
struct Multiplied {
  Matrix hidden, weight;
  int dim;
};

struct SweptStatistics;
struct SweptTotals;
struct Merged;

struct Sweep {
  Loss loss;
  Multiplied student, teacher;
  int splits;          // blocks that share a token's vocabulary
  int split_entries;   // of each but the last, a multiple of kSweepEntries
  // Workspace, written and read: (tokens, splits), (tokens), (tokens, splits).
  SweptStatistics* statistics;
  Merged* merged;
  SweptTotals* totals;
};

// Bytes of a token's workspace.
int64_t sweep_token_bytes(int splits);

// Of a block's shared memory: of the pass for statistics, or of that for totals.
int64_t sweep_shared_bytes(Instructions instructions, bool totals);

// Terms of every token. Sweep's workspace is `workspace`, tokens · sweep_token_bytes(splits) bytes, aligned to 16; its pointers to it need
// not be set. `divergence` is an index in DK_FOR_EACH_DIVERGENCE, of one that can be renormalised, or negative: none.
// `cluster` blocks of neighbouring tokens share what they read of the heads: 1, or with kWgmma also 2 or 4.
void sweep(Sweep sweep, void* workspace, int divergence, const float* parameters, Instructions instructions, int cluster, void* stream);

}  // namespace distill_kernels::cuda
