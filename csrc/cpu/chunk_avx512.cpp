// Every function below, templates included, is compiled for this target; it is entered only where the processor has it.
#if defined(__x86_64__)
#include "avx512.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif
#define DK_ISA avx512
// Sums of products of four bytes, those of `left` signed. vpmaddubsw would saturate; by 16-bit halves nothing can.
#define DK_DOT8(sum, left, right)                                                                                                   \
  (sum + (Integers)(_mm512_madd_epi16(_mm512_srai_epi16(_mm512_slli_epi16((__m512i)(left), 8), 8),                                  \
                                      _mm512_and_si512((__m512i)(right), _mm512_set1_epi16(255)))) +                                \
   (Integers)(_mm512_madd_epi16(_mm512_srai_epi16((__m512i)(left), 8), _mm512_srli_epi16((__m512i)(right), 8))))
#include "chunk.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
