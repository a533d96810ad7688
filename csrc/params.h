// Plain structs that every kernel receives: pointers, sizes, strides. No torch, no Python, no device API.
#pragma once

#include <cstdint>

namespace distill_kernels {

constexpr int kTerms = 3;  // divergence, cross entropy, squared log-sum-exp
constexpr int kStats = 6;  // divergence, cross entropy, student entropy, teacher entropy, top-1 agreement, tail mass
constexpr int kMaxParameters = 2;
constexpr int64_t kTokenAlignment = 16;  // one AVX-512 vector of float
constexpr int64_t kPanel = 64;           // tokens, or dimensions, that a CPU product takes together

enum class Element : int { kFloat32, kBfloat16, kFloat16 };

// A row-major matrix of the caller's; elements of a row are neighbours.
struct Matrix {
  const void* data;
  Element element;
  int64_t stride;  // elements from one row to the next
};

// One model. Its logits are softcap(scale · (hidden · weightᵀ + bias)), softcap(a) = cap · tanh(a / cap).
struct Model {
  Matrix hidden;      // (tokens, dim)
  Matrix weight;      // (vocabulary, dim); data null: there is no such model
  const float* bias;  // (vocabulary), or null
  int64_t dim;
  float scale;
  float softcap;  // 0: none
  float* logits;  // (vocabulary, stride) workspace: the tokens of one vocabulary entry are neighbours; null (both models'): not kept
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
  float* scores;              // (vocabulary), written: norms of the columns of dz, which is left in the student's logits; null: not wanted
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
