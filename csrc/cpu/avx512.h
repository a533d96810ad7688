// What the instruction sets of 512-bit vectors share. Headers come before a file's target: see chunk.cpp.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#define DK_LANES 16
// The nearest integer, and v·2ⁿ with the underflow and overflow that follow.
#define DK_ROUND(v) reinterpret_cast<Vector>(_mm512_roundscale_ps(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT))
#define DK_SCALE(v, n) reinterpret_cast<Vector>(_mm512_scalef_ps(reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(n)))
// One instruction each. GCC makes two of the comparison with a constant.
#define DK_MAXIMUM(a, b) reinterpret_cast<Vector>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)))
#define DK_MINIMUM(a, b) reinterpret_cast<Vector>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)))
