// Plain structs that every kernel receives: pointers, sizes, strides. No torch, no Python, no device API.
#pragma once

#include <cstdint>

namespace distill_kernels {

constexpr int kTerms = 3;  // divergence, cross entropy, squared log-sum-exp
constexpr int kStats = 6;  // divergence, cross entropy, student entropy, teacher entropy, top-1 agreement, tail mass
constexpr int kMaxParameters = 2;

// One model's logits of a chunk of tokens. They arrive as the bare product hidden · weightᵀ and mean
// softcap(scale · (product + bias)), softcap(a) = cap · tanh(a / cap).
struct Logits {
  float* data;        // (vocabulary, stride): the tokens of one vocabulary entry are contiguous
  const float* bias;  // (vocabulary), or null
  float scale;
  float softcap;  // 0: none
};

// The row kernel's whole job: per-token terms of the loss, and the gradient of Σ coefficients · terms over `student.data`.
struct RowParams {
  int64_t tokens;
  int64_t stride;  // at least `tokens`, a multiple of kTokenAlignment; lanes beyond `tokens` hold anything finite
  int64_t vocabulary;
  Logits student;  // data: logits on entry, d loss / d product on return if `gradient`
  Logits teacher;  // data null: there is no teacher; overwritten as scratch
  const int64_t* labels;      // (tokens), negative: none; null: no labels at all
  const float* coefficients;  // (tokens, kTerms)
  float* terms;               // (tokens, kTerms), written
  float* stats;               // (tokens, kStats), written; null: not wanted
  int divergence;             // index in DK_FOR_EACH_DIVERGENCE, negative: no divergence term
  float parameters[kMaxParameters];
  float temperature;
  float label_smoothing;
  float log_probability_floor;
  float tail_log_probability;
  bool untempered;  // the cross-entropy or squared log-sum-exp term is wanted
  bool gradient;
};

constexpr int64_t kTokenAlignment = 16;  // one AVX-512 vector of float

}  // namespace distill_kernels
