// Every function below, templates included, is compiled for this target; it is entered only where the processor has it. Compilers
// older than the instructions (GCC 9, Clang 8) leave it out, and chunk.cpp does too.
#if defined(__x86_64__) && __has_include(<avx512bf16intrin.h>)
#include "avx512.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512vnni,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512vnni,avx512bf16,avx2,fma")
#endif
#define DK_ISA avx512bf16
// sum + left · right over two bfloat16 in each lane, exact products, float sums; and float rounded to the nearest bfloat16.
#define DK_DOT(sum, left, right) \
  reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), (__m512bh)(left), (__m512bh)(right)))
#define DK_TO_BFLOAT16(v) ((Halves)(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v))))
// sum + left · right over four bytes in each lane, those of left signed.
#define DK_DOT8(sum, left, right) ((Integers)(_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(right), (__m512i)(left))))
#include "chunk.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
