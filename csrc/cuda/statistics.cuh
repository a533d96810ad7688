// Loss of a token and gradient of its logits, from logits that come a few at a time in any order: what every schedule's kernels share.
//
// z are the student's logits and y the teacher's, after their heads. A thread takes some entries of one token's vocabulary into sums of
// its own; sums of different threads, warps and blocks are merged pairwise, in an order that the kernel fixes. Two kinds of sums:
//
//   Statistics  maxima and sums of an online softmax, and what a divergence sums in the same pass if its sums can be renormalised: those
//               are taken with logits less the running maximum in place of log-probabilities.
//   Totals      sums that need the log-sum-exps: every other divergence, the stats, and whatever has an entry below the floor.
//
// Statistics → `merged` → Merged, then (where wants_totals says so) a second pass for Totals → `finish` → Factors → `gradient`.
#pragma once

#include <cmath>

#include "../divergence.h"
#include "device.cuh"
#include "loss.h"

namespace distill_kernels::cuda {

constexpr float kLowest = -3.402823466e38f;  // where a maximum starts: finite, so that −inf less it is −inf and not NaN

// The math that divergences are written in. On the host too, for the functors are.
DK_INLINE float exp(float x) { return expf(x); }
DK_INLINE float log(float x) { return logf(x); }
DK_INLINE float maximum(float a, float b) { return fmaxf(a, b); }
DK_INLINE float minimum(float a, float b) { return fminf(a, b); }
DK_INLINE float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }

#include "../generated/divergences.h"

struct no_divergence {
  static constexpr bool one_pass = false;
  static no_divergence from(const float*) { return {}; }
  template <class T>
  DK_INLINE ValueSlope<T> operator()(T, T) const {
    return {T{}, T{}};
  }
};
template <class Divergence>
constexpr bool kActive = true;
template <>
inline constexpr bool kActive<no_divergence> = false;

DK_DEVICE float meant_logit(float product, const Head& head, int entry) {
  float z = product;
  if (head.bias != nullptr) z += load(head.bias + entry);
  z *= head.scale;
  return head.softcap == 0.0f ? z : head.softcap * tanhf(z / head.softcap);
}

struct Softmax {
  float maximum, minimum, sum;
  int top;  // place of the maximum, the first of several; known if stats are wanted
};
struct Statistics {
  Softmax q, p;
  float sum_untempered, sum_of_logits, label_logit;
  float value, slope;  // of a divergence that can be renormalised
};

DK_DEVICE Statistics no_statistics() {
  const Softmax none{kLowest, -kLowest, 0.0f, 0};
  return {none, none, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
}

// Not below the floor. A comparison and not a maximum, which would make a number of NaN.
DK_DEVICE float raised(float log_probability, float floor) { return log_probability < floor ? floor : log_probability; }

// By how much sums taken relative to one maximum exceed those relative to another; from no maximum there is nothing to bring.
DK_DEVICE float excess(float from, float to, float inverse_temperature) { return from == kLowest ? 0.0f : (to - from) * inverse_temperature; }

// Some entries' logits into a maximum, a minimum and the place. `entry(i)` is the place in the vocabulary of z[i]; if Masked, what lies
// outside of it counts for nothing.
template <bool Masked, int N, class Entry>
DK_DEVICE void take_extremes(Softmax& softmax, const float (&z)[N], Entry entry, int vocabulary, bool top) {
  const float before = softmax.maximum;
  float high = before, low = softmax.minimum;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (Masked && unsigned(entry(i)) >= unsigned(vocabulary)) continue;
    high = fmaxf(high, z[i]);
    low = fminf(low, z[i]);
  }
  if (top && high >= before) {  // equal: entries do not come in the order of their places
#pragma unroll
    for (int i = N - 1; i >= 0; --i)
      if (z[i] == high && (high > before || entry(i) < softmax.top) && (!Masked || unsigned(entry(i)) < unsigned(vocabulary)))
        softmax.top = entry(i);
  }
  softmax.maximum = high;
  softmax.minimum = low;
}

// Takes N entries of one token. The label is negative where there is none.
template <bool Masked, int N, class Divergence, class Entry>
DK_DEVICE void take_statistics(
    Statistics& s, const float (&z)[N], const float (&y)[N], Entry entry, int label, const Loss& loss, const Divergence& divergence) {
  const float inverse = loss.inverse_temperature;
  const float before_q = s.q.maximum, before_p = s.p.maximum;
  const auto inside = [&](int i) { return !Masked || unsigned(entry(i)) < unsigned(loss.vocabulary); };
  take_extremes<Masked>(s.q, z, entry, loss.vocabulary, loss.stats != nullptr);
  if (loss.has_teacher) take_extremes<Masked>(s.p, y, entry, loss.vocabulary, loss.stats != nullptr);
  if (s.q.maximum > before_q) {
    s.q.sum *= exp((before_q - s.q.maximum) * inverse);
    if (loss.separate) s.sum_untempered *= exp(before_q - s.q.maximum);
  }
  if (loss.has_teacher && s.p.maximum > before_p) s.p.sum *= exp((before_p - s.p.maximum) * inverse);
  if constexpr (Divergence::one_pass) {
    const float excess_q = excess(before_q, s.q.maximum, inverse);
    const float excess_p = loss.has_teacher ? excess(before_p, s.p.maximum, inverse) : excess_q;
    if (excess_q != 0.0f || excess_p != 0.0f) {
      const ValueSlope<float> brought = divergence.renormalise(s.value, s.slope, excess_p, excess_q);
      s.value = brought.value;
      s.slope = brought.slope;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (!inside(i)) continue;
    const float log_q = (z[i] - s.q.maximum) * inverse;
    float log_p = log_q;
    s.q.sum += exp(log_q);
    if (loss.has_teacher) {
      log_p = (y[i] - s.p.maximum) * inverse;
      s.p.sum += exp(log_p);
    }
    if constexpr (Divergence::one_pass) {
      const ValueSlope<float> term = divergence(raised(log_p, loss.floor), raised(log_q, loss.floor));
      s.value += term.value;
      s.slope += term.slope;
    }
    if (loss.separate) s.sum_untempered += exp(z[i] - s.q.maximum);
    if (loss.smoothing) s.sum_of_logits += z[i];
    if (label >= 0 && entry(i) == label) s.label_logit = z[i];
  }
}

DK_DEVICE void merge(Softmax& into, const Softmax& other, float inverse_temperature) {
  const float high = fmaxf(into.maximum, other.maximum);
  into.sum = into.sum * exp((into.maximum - high) * inverse_temperature) + other.sum * exp((other.maximum - high) * inverse_temperature);
  if (other.maximum > into.maximum || (other.maximum == into.maximum && other.top < into.top)) into.top = other.top;
  into.maximum = high;
  into.minimum = fminf(into.minimum, other.minimum);
}

template <class Divergence>
DK_DEVICE void merge(Statistics& into, const Statistics& other, const Loss& loss, const Divergence& divergence) {
  const float inverse = loss.inverse_temperature;
  const float high_q = fmaxf(into.q.maximum, other.q.maximum), high_p = fmaxf(into.p.maximum, other.p.maximum);
  if constexpr (Divergence::one_pass) {
    const auto brought = [&](const Statistics& s) {
      const float excess_q = excess(s.q.maximum, high_q, inverse);
      return divergence.renormalise(s.value, s.slope, loss.has_teacher ? excess(s.p.maximum, high_p, inverse) : excess_q, excess_q);
    };
    const ValueSlope<float> a = brought(into), b = brought(other);
    into.value = a.value + b.value;
    into.slope = a.slope + b.slope;
  }
  if (loss.separate)
    into.sum_untempered = into.sum_untempered * exp(into.q.maximum - high_q) + other.sum_untempered * exp(other.q.maximum - high_q);
  into.sum_of_logits += other.sum_of_logits;
  into.label_logit += other.label_logit;  // of all but the one that has it 0
  merge(into.q, other.q, inverse);
  if (loss.has_teacher) merge(into.p, other.p, inverse);
}

// Of a token, once its whole vocabulary is in one Statistics.
struct Merged {
  float max_q, log_sum_q, log_sum_untempered;  // log Σ exp less the maximum
  float max_p, log_sum_p;
  float sum_of_log_q, label_logit, agreement;  // Σ log q untempered
  float value, slope;
  bool clamped;  // an entry is below the floor
};

template <class Divergence>
DK_DEVICE Merged merged(const Statistics& s, const Loss& loss, const Divergence& divergence) {
  const float inverse = loss.inverse_temperature;
  Merged m{};
  m.max_q = s.q.maximum;
  m.log_sum_q = log(s.q.sum);
  m.log_sum_untempered = loss.separate ? log(s.sum_untempered) : m.log_sum_q;
  m.clamped = (s.q.minimum - s.q.maximum) * inverse - m.log_sum_q < loss.floor;
  if (loss.untempered) m.clamped |= s.q.minimum - s.q.maximum - m.log_sum_untempered < loss.floor;
  m.max_p = m.max_q;
  m.log_sum_p = m.log_sum_q;
  if (loss.has_teacher) {
    m.max_p = s.p.maximum;
    m.log_sum_p = log(s.p.sum);
    m.clamped |= (s.p.minimum - s.p.maximum) * inverse - m.log_sum_p < loss.floor;
    m.agreement = s.q.top == s.p.top ? 1.0f : 0.0f;
  }
  m.sum_of_log_q = s.sum_of_logits - float(loss.vocabulary) * (m.max_q + m.log_sum_untempered);
  m.label_logit = s.label_logit;
  if constexpr (Divergence::one_pass) {
    const ValueSlope<float> right = divergence.renormalise(s.value, s.slope, m.log_sum_p, m.log_sum_q);
    m.value = right.value;
    m.slope = right.slope;
  }
  return m;
}

// Whether the loss of a token needs Totals.
template <class Divergence>
DK_DEVICE bool wants_totals(const Merged& m, const Loss& loss) {
  if (loss.stats != nullptr || (kActive<Divergence> && !Divergence::one_pass)) return true;
  return m.clamped && (kActive<Divergence> || loss.smoothing);
}

struct Totals {
  float value, slope, sum_of_log_q, unclamped, entropy_q, entropy_p, tail;  // unclamped: entries not below the floor, untempered
};

DK_DEVICE Totals no_totals() { return {}; }

template <bool Masked, int N, class Divergence, class Entry>
DK_DEVICE void take_totals(
    Totals& t, const float (&z)[N], const float (&y)[N], Entry entry, const Merged& m, const Loss& loss, const Divergence& divergence) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (Masked && unsigned(entry(i)) >= unsigned(loss.vocabulary)) continue;
    const float bare_q = (z[i] - m.max_q) * loss.inverse_temperature - m.log_sum_q;
    const float log_q = raised(bare_q, loss.floor);
    const float log_p = loss.has_teacher ? raised((y[i] - m.max_p) * loss.inverse_temperature - m.log_sum_p, loss.floor) : log_q;
    if constexpr (kActive<Divergence>) {
      const ValueSlope<float> term = divergence(log_p, log_q);
      t.value += term.value;
      t.slope += bare_q < loss.floor ? 0.0f : term.slope;
    }
    if (loss.smoothing) {
      const float bare = z[i] - m.max_q - m.log_sum_untempered;
      t.sum_of_log_q += raised(bare, loss.floor);
      t.unclamped += bare < loss.floor ? 0.0f : 1.0f;
    }
    if (loss.stats != nullptr) {
      const float q = exp(log_q);
      t.entropy_q -= q * log_q;
      if (loss.has_teacher) {
        const float p = exp(log_p);
        t.entropy_p -= p * log_p;
        t.tail += p < loss.tail_probability ? q : 0.0f;
      }
    }
  }
}

DK_DEVICE void merge(Totals& into, const Totals& other) {
  into.value += other.value;
  into.slope += other.slope;
  into.sum_of_log_q += other.sum_of_log_q;
  into.unclamped += other.unclamped;
  into.entropy_q += other.entropy_q;
  into.entropy_p += other.entropy_p;
  into.tail += other.tail;
}

// Terms of a token, and what its gradient is made of.
struct Factors {
  float value, cross_entropy, nll, lse;
  float slope;                                 // Σ slope
  float weight, pull;                          // of the divergence's gradient, and of the untempered softmax
  float label_push, smoothing_push;
};

DK_DEVICE bool counts(const float* coefficients) {
  return load(coefficients) != 0.0f || load(coefficients + 1) != 0.0f || load(coefficients + 2) != 0.0f;
}

// Of a token that counts; totals only where wants_totals.
template <class Divergence>
DK_DEVICE Factors finish(const Merged& m, const Totals& totals, const float* coefficients, int label, const Loss& loss) {
  const float kd = load(coefficients), ce = load(coefficients + 1), z_loss = load(coefficients + 2);
  Factors f{};
  if constexpr (kActive<Divergence>) {
    const bool early = Divergence::one_pass && !m.clamped;  // so a token's loss does not depend on whether stats are wanted
    f.value = early ? m.value : totals.value;
    f.slope = early ? m.slope : totals.slope;
  }
  f.lse = m.max_q + m.log_sum_untempered;
  f.weight = kd * loss.inverse_temperature;
  f.pull = 2.0f * z_loss * f.lse;
  if (label >= 0) {
    const float bare = m.label_logit - m.max_q - m.log_sum_untempered;
    f.nll = -raised(bare, loss.floor);
    f.label_push = ce * (bare < loss.floor ? 0.0f : 1.0f - loss.label_smoothing);
    f.cross_entropy = (1.0f - loss.label_smoothing) * f.nll;
    f.pull += f.label_push;
    if (loss.smoothing) {
      const float share = loss.label_smoothing / float(loss.vocabulary);
      f.cross_entropy -= share * (m.clamped ? totals.sum_of_log_q : m.sum_of_log_q);
      f.smoothing_push = ce * share;
      f.pull += f.smoothing_push * (m.clamped ? totals.unclamped : float(loss.vocabulary));
    }
  }
  return f;
}

DK_DEVICE void write_terms(int64_t token, const Merged& m, const Totals& totals, const Factors& f, const Loss& loss) {
  float* terms = loss.terms + token * kTerms;
  store(terms, f.value);
  store(terms + 1, f.cross_entropy);
  store(terms + 2, loss.untempered ? f.lse * f.lse : 0.0f);
  if (loss.stats == nullptr) return;
  const float stats[kStats] = {f.value, f.nll, totals.entropy_q, totals.entropy_p, m.agreement, totals.tail};
#pragma unroll
  for (int i = 0; i < kStats; ++i) store(loss.stats + token * kStats + i, stats[i]);
}

// Of a token that does not count, whatever it holds.
DK_DEVICE void write_no_terms(int64_t token, const Loss& loss) {
#pragma unroll
  for (int i = 0; i < kTerms; ++i) store(loss.terms + token * kTerms + i, 0.0f);
  if (loss.stats == nullptr) return;
#pragma unroll
  for (int i = 0; i < kStats; ++i) store(loss.stats + token * kStats + i, 0.0f);
}

// dz of one entry, times `scale`: the gradient of the bare product, where `scale` is the student's or a multiple of it.
template <class Divergence>
DK_DEVICE float gradient(
    float z, float y, int entry, int label, const Merged& m, const Factors& f, float scale, const Loss& loss, const Divergence& divergence) {
  float dz = 0.0f;
  if constexpr (kActive<Divergence>) {
    const float bare_q = (z - m.max_q) * loss.inverse_temperature - m.log_sum_q;
    const float log_q = raised(bare_q, loss.floor);
    const float log_p = loss.has_teacher ? raised((y - m.max_p) * loss.inverse_temperature - m.log_sum_p, loss.floor) : log_q;
    const float slope = divergence(log_p, log_q).slope;
    dz = f.weight * ((bare_q < loss.floor ? 0.0f : slope) - exp(log_q) * f.slope);
  }
  if (loss.untempered) {
    const float bare = z - m.max_q - m.log_sum_untempered;
    dz += f.pull * exp(bare);
    if (entry == label) dz -= f.label_push;
    if (loss.smoothing && bare >= loss.floor) dz -= f.smoothing_push;
  }
  if (loss.student.softcap != 0.0f) {
    const float ratio = z / loss.student.softcap;
    dz *= 1.0f - ratio * ratio;
  }
  return dz * scale;
}

}  // namespace distill_kernels::cuda
