// Every function below, templates included, is compiled for this target; it is entered only where the processor has it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif
#define DK_ISA avx512
#define DK_LANES 16
// The nearest integer, and v·2ⁿ with the underflow and overflow that follow.
#define DK_ROUND(v) reinterpret_cast<Vector>(_mm512_roundscale_ps(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT))
#define DK_SCALE(v, n) reinterpret_cast<Vector>(_mm512_scalef_ps(reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(n)))
#include "chunk.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
