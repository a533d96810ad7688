// A vector of DK_LANES floats and its arithmetic, in the compiler's vector extension (GCC and Clang, any processor), so that one
// source serves every instruction set. Included inside the namespace of one instruction set: nothing here may be shared between
// two of them, or the linker could keep the copy that the processor at hand cannot run.

typedef float Vector __attribute__((vector_size(4 * DK_LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * DK_LANES)));  // also what comparing two Vectors gives: 0 or −1

DK_INLINE Vector broadcast(float x) { return x - Vector{}; }  // x − 0 is x, which the compiler knows; x + 0 is not, for −0
DK_INLINE Vector load(const float* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
DK_INLINE void store(float* to, Vector v) { __builtin_memcpy(to, &v, sizeof v); }
typedef uint16_t Halves __attribute__((vector_size(2 * DK_LANES)));
DK_INLINE Halves load(const uint16_t* from) {
  Halves v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
DK_INLINE void store(uint16_t* to, Halves v) { __builtin_memcpy(to, &v, sizeof v); }

// What one lane of a product multiplies, 4 bytes either way: a float, or two bfloat16 that are neighbours along the depth.
struct Pair {
  uint16_t low, high;
};
DK_INLINE Integers load(const Pair* from) {
  Integers v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
DK_INLINE void store(Pair* to, Integers v) { __builtin_memcpy(to, &v, sizeof v); }
// Or four bytes: signed of a head's row, unsigned of tokens.
struct Quad {
  uint8_t bytes[4];
};
DK_INLINE Integers load(const Quad* from) {
  Integers v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
DK_INLINE Integers pairs(Halves low, Halves high) { return __builtin_convertvector(low, Integers) | __builtin_convertvector(high, Integers) << 16; }

DK_INLINE Vector as_float(Integers v) { return reinterpret_cast<Vector>(v); }
DK_INLINE Integers as_bits(Vector v) { return reinterpret_cast<Integers>(v); }

DK_INLINE Vector select(Integers mask, Vector a, Vector b) { return mask ? a : b; }
// v in lanes before `count`, 0 in the others.
DK_INLINE Vector before(int64_t count, Vector v) {
  Vector out{};
  for (int lane = 0; lane < DK_LANES; ++lane) out[lane] = lane < count ? v[lane] : 0.0f;
  return out;
}
static DK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

DK_INLINE Vector from_bfloat16(Halves h) { return as_float(__builtin_convertvector(h, Integers) << 16); }
// Exponent and mantissa are moved to their places and the bias of the exponent is raised by 112; infinity and NaN have all exponent bits.
// A subnormal is an integer times 2⁻²⁴: no subnormal float on the way, which a caller may have the processor take for zero.
DK_INLINE Vector from_float16(Halves h) {
  const Integers bits = __builtin_convertvector(h, Integers), magnitude = bits & 0x7fff;
  const Integers subnormal = as_bits(__builtin_convertvector(magnitude, Vector) * 0x1p-24f);
  const Integers finite = magnitude < 0x0400 ? subnormal : (magnitude << 13) + (112 << 23);
  const Integers value = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : finite;
  return as_float(value | ((bits & 0x8000) << 16));
}

// Where one argument is NaN these give the second, as the x86 instructions do: put the constant first and a NaN passes.
#ifdef DK_MAXIMUM
DK_INLINE Vector maximum(Vector a, Vector b) { return DK_MAXIMUM(a, b); }
DK_INLINE Vector minimum(Vector a, Vector b) { return DK_MINIMUM(a, b); }
#else
DK_INLINE Vector maximum(Vector a, Vector b) { return a > b ? a : b; }
DK_INLINE Vector minimum(Vector a, Vector b) { return a < b ? a : b; }
#endif
DK_INLINE Vector sign(Vector a) { return select(a > 0.0f, broadcast(1.0f), select(a < 0.0f, broadcast(-1.0f), Vector{})); }

// e^x, relative error below 2e-7 (tested); 0 below the smallest normal number, infinity from 88.73 at the latest; NaN stays NaN.
// x = n·ln 2 + r with |r| ≤ ½·ln 2 (n·ln 2 in two parts, Cody and Waite 1980); e^r by a degree-7 polynomial (Cephes expf).
DK_INLINE Vector exp(Vector x) {
#ifdef DK_SCALE
  const Vector in = maximum(broadcast(-104.0f), x);  // so that −∞ is not subtracted from −∞
  const Vector n = DK_ROUND(in * 1.44269504088896341f);
#else
  const Vector in = minimum(broadcast(88.3762f), maximum(broadcast(-87.3365f), x));
  const Vector round_to_integer = broadcast(12582912.0f);  // 1.5·2²³: adding it leaves the nearest integer in the low bits
  const Vector n = (in * 1.44269504088896341f + round_to_integer) - round_to_integer;
#endif
  const Vector r = (in - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector y = broadcast(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
#ifdef DK_SCALE
  return select(x < -87.3365f, Vector{}, DK_SCALE(y, n));
#else
  const Vector power = as_float((__builtin_convertvector(n, Integers) + 127) << 23);
  return select(x < -87.3365f, Vector{}, select(x > 88.3762f, broadcast(__builtin_inff()), y * power));
#endif
}

// ln x for x ≥ 2⁻¹²⁶ (smaller arguments are taken as that), absolute error below 1e-7·max(1, |ln x|) (tested); NaN stays NaN.
// x = m·2ᵉ with m in [√½, √2); ln m by a degree-8 polynomial (Cephes logf).
DK_INLINE Vector log(Vector x) {
  const Integers bits = as_bits(maximum(x, broadcast(1.17549435e-38f)));
  const Integers half = (bits & 0x007fffff) | 0x3f000000;  // mantissa in [½, 1)
  const Integers low = as_float(half) < 0.707106781186547524f;
  const Vector e = __builtin_convertvector((bits >> 23) - 126 + low, Vector);
  const Vector m = as_float(half) + select(low, as_float(half), Vector{}) - 1.0f;
  Vector y = broadcast(7.0376836292e-2f);
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  const Vector square = m * m;
  y = y * m * square - e * 2.12194440e-4f - 0.5f * square;
  return select(x == x, m + y + e * 0.693359375f, x);
}

// What is done for each token once, after the sweeps, is done in double, by the same generated code.
static DK_INLINE double exp(double x) { return ::exp(x); }

// tanh x, absolute error below 1e-7 (tested); near 0 the odd series, for 1 − 2/(e²ˣ + 1) loses its digits there, as it does below.
DK_INLINE Vector tanh(Vector x) {
  const Vector square = x * x;
  const Vector near = x * (1.0f + square * (-0.333333333f + square * (0.133333333f - square * 0.0539682540f)));
  const Vector size = select(x < 0.0f, -x, x);
  const Vector far = (1.0f - 2.0f / (exp(2.0f * size) + 1.0f)) * sign(x);
  return select(square < 0.04f, near, far);
}
