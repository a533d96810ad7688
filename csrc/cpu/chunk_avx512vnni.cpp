// Every function below, templates included, is compiled for this target; it is entered only where the processor has it.
#if defined(__x86_64__)
#include "avx512.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512vnni,avx2,fma")
#endif
#define DK_ISA avx512vnni
// sum + left · right over four bytes in each lane, those of left signed.
#define DK_DOT8(sum, left, right) ((Integers)(_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(right), (__m512i)(left))))
#include "chunk.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
