// Plain structs of the CUDA kernels, passed by value. Addresses are of the device.
#pragma once

#include <cstdint>

#include "../params.h"

namespace distill_kernels::cuda {

// A model's logits are softcap(scale · (product + bias)), softcap(a) = cap · tanh(a / cap).
struct Head {
  const float* bias;  // (vocabulary), or null
  float scale;
  float softcap;  // 0: none
};

// What is computed of every token, by whatever schedule its logits come.
struct Loss {
  int64_t tokens;
  int vocabulary;
  Head student, teacher;
  const int64_t* labels;      // (tokens), negative: none; null: no labels at all
  const float* coefficients;  // (tokens, kTerms); a token without any is not computed, and gets zeros
  float* terms;               // (tokens, kTerms), written
  float* stats;               // (tokens, kStats), written; null: not wanted
  float inverse_temperature;
  float label_smoothing;
  float floor;             // of log-probabilities
  float tail_probability;  // see stats
  bool has_teacher;
  bool untempered;  // the cross-entropy or squared log-sum-exp term is wanted
  bool separate;    // and the temperature is not 1: the untempered log-sum-exp is another one
  bool smoothing;   // label smoothing of a wanted cross entropy
};

}  // namespace distill_kernels::cuda
