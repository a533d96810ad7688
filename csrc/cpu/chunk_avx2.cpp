// Every function below, templates included, is compiled for this target; it is entered only where the processor has it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define DK_ISA avx2
#define DK_LANES 8
// Sums of products of four bytes, those of `left` signed. vpmaddubsw would saturate; by 16-bit halves nothing can.
#define DK_DOT8(sum, left, right)                                                                                                   \
  (sum + (Integers)(_mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16((__m256i)(left), 8), 8),                                  \
                                      _mm256_and_si256((__m256i)(right), _mm256_set1_epi16(255)))) +                                \
   (Integers)(_mm256_madd_epi16(_mm256_srai_epi16((__m256i)(left), 8), _mm256_srli_epi16((__m256i)(right), 8))))
#include "chunk.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
