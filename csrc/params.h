// Plain structs that every kernel receives: pointers, sizes, strides. No torch, no Python, no device API.
#pragma once

#include <cstdint>

namespace distill_kernels {

constexpr int kTerms = 3;  // divergence, cross entropy, squared log-sum-exp
constexpr int kStats = 6;  // divergence, cross entropy, student entropy, teacher entropy, top-1 agreement, tail mass
constexpr int kMaxParameters = 2;
constexpr int64_t kTokenAlignment = 16;  // one AVX-512 vector of float
constexpr int64_t kPanel = 64;           // tokens, or dimensions, that a CPU product takes together
constexpr int64_t kTurn = 64;            // dimensions that are turned together before they are quantised

enum class Element : int { kFloat32, kBfloat16, kFloat16 };

// A row-major matrix of the caller's; elements of a row are neighbours.
struct Matrix {
  const void* data;
  Element element;
  int64_t stride;  // elements from one row to the next
};

// A head in 8 bits, its rows turned by signs and a Hadamard matrix: see quantise.inc.
struct Quantised {
  const int8_t* rows;   // (vocabulary, dim); null: none
  int64_t dim;          // the model's, padded to whole blocks of kTurn
  const float* scales;  // (vocabulary, 3): of a row its scale, 128 · Σ of its integers, and its norm before
};

// One model. Its logits are softcap(scale · (hidden · weightᵀ + bias)), softcap(a) = cap · tanh(a / cap).
struct Model {
  Matrix hidden;      // (tokens, dim)
  Matrix weight;      // (vocabulary, dim); data null: there is no such model
  const float* bias;  // (vocabulary), or null
  int64_t dim;
  float scale;
  float softcap;  // 0: none
  // (vocabulary, stride) workspace: the tokens of one vocabulary entry are neighbours; null (both models'): not kept. Of a quantised sweep
  // (kept count, stride).
  float* logits;
  Quantised quantised;  // both models' or none: then the chunk is swept
};

// What of a chunk is to be done. One whose gradients go over a few columns of dz takes kScores, kGather and kMultiply, with the same sizes
// and scratch, so that each finds what the one before it left: or kScores and kGradients, if they are to go over all columns after all.
// kMultiply may come by itself: it needs no logits and no teacher.
//
// One with quantised heads takes kSweep, which makes scores; kCorrect, which makes the kept columns' logits, the terms and their errors;
// where those are too large kExact, which makes the terms again; and kGather and kMultiply as before.
//
// One whose tokens list entries takes kListed, and where gradients are asked for kListedGradients, for which logits are kept.
enum class Stage : int { kWhole, kScores, kGradients, kGather, kMultiply, kSweep, kCorrect, kExact, kListed, kListedGradients };

// Vocabulary entries by which a quantised sweep learns about where the log-sum-exps are.
struct Pilot {
  int64_t count;
  const int64_t* columns;  // (count) ascending
};

// The columns of dz that gradient products go over, each times its weight.
struct Kept {
  int64_t count;           // 0: products go over the whole vocabulary
  const int64_t* columns;  // (count) ascending
  const float* weights;    // (count)
  float* dz;               // (count, stride) written by kGather, read by kMultiply; a quantised sweep's logits may lie there before
  float* squares;          // (2, count) written by kMultiply: ‖·‖² of what goes to d_hidden and to d_weight; null: not wanted
};

// Vocabulary entries that each token lists, each once and at most `width`, in the vocabulary's order: entries[i] is at places[i], a token
// times width plus its place among the token's own.
struct Listed {
  int64_t count;
  const int64_t* entries;  // (count) ascending; negative: none
  const int64_t* places;   // (count)
  int64_t width;
  float* logits;           // (tokens, width) written at `places`
  float* others;           // (tokens, 3) written: of the entries not listed a reference r, log Σ exp((z − r) / temperature), log Σ exp(z − r)
  const float* d_logits;   // (tokens, width) read at `places`: gradient of the listed logits
  const float* d_others;   // (tokens, 2): another entry's is their softmaxes, tempered and untempered, times these
};

// All of one chunk: per-token terms of the loss, and the gradients of Σ coefficients · terms that are asked for. Gradients need the
// logits to be kept.
struct ChunkParams {
  int64_t tokens;
  int64_t stride;  // at least `tokens`, a multiple of kTokenAlignment
  int64_t vocabulary;
  Model student;
  Model teacher;
  const int64_t* labels;      // (tokens), negative: none; null: no labels at all
  const float* coefficients;  // (tokens, kTerms)
  float* terms;               // (tokens, kTerms), written
  float* stats;               // (tokens, kStats), written; null: not wanted
  float* d_hidden;            // (tokens, student dim), written; null: not wanted
  float* d_weight;            // (vocabulary, student dim), written if `first`, else added to; null: not wanted
  float* d_bias;              // (vocabulary), likewise
  float* scores;              // (vocabulary), written by kScores: norms of the columns of dz; by kSweep: what stands for them
  Kept kept;                  // then d_weight is always added to
  Pilot pilot;
  Listed listed;
  float* errors;  // (tokens, 2), written by kCorrect: standard errors of the divergence and of the untempered log-sum-exp
  bool first;
  int divergence;  // index in DK_FOR_EACH_DIVERGENCE, negative: no divergence term
  float parameters[kMaxParameters];
  float temperature;
  float label_smoothing;
  float log_probability_floor;
  float tail_log_probability;
  bool untempered;  // the cross-entropy or squared log-sum-exp term is wanted
};

}  // namespace distill_kernels
