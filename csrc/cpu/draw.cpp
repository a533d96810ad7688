#include "draw.h"

#include <cmath>
#include <vector>

namespace distill_kernels {
namespace {

constexpr int64_t kUnit = int64_t(1) << 32;
constexpr int kLanes = 16;  // sums of their own, so that adding up does not wait for itself; added in order

struct Above {
  int64_t count;  // of scores above a threshold
  double rest;    // sum of the others
};
Above above(const float* scores, int64_t vocabulary, double threshold) {
  double rest[kLanes] = {};
  int64_t count[kLanes] = {};
  const auto take = [&](int64_t v, int lane) {
    const double score = scores[v];
    const bool higher = score > threshold;
    count[lane] += higher;
    rest[lane] += higher ? 0.0 : score;
  };
  int64_t v = 0;
  for (; v + kLanes <= vocabulary; v += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) take(v + lane, lane);
  for (; v < vocabulary; ++v) take(v, 0);
  Above sum{0, 0.0};
  for (int lane = 0; lane < kLanes; ++lane) {
    sum.count += count[lane];
    sum.rest += rest[lane];
  }
  return sum;
}

// t with Σ min(1, score / t) = kept. Scores above it are sure; with them left out the threshold of the others is lower, so that more are
// above it, until none is added.
double threshold_of(const float* scores, int64_t vocabulary, int64_t kept) {
  double threshold = above(scores, vocabulary, INFINITY).rest / double(kept);
  for (int64_t sure = 0;;) {
    const Above now = above(scores, vocabulary, threshold);
    if (now.count <= sure || now.count >= kept) return threshold;
    sure = now.count;
    threshold = now.rest / double(kept - sure);
  }
}

void include(const float* scores, int64_t vocabulary, int64_t kept, int64_t* units) {
  const double inverse = 1.0 / std::fmax(threshold_of(scores, vocabulary, kept), 2.2250738585072014e-308);
  const auto probability_of = [=](int64_t v) {
    const double ratio = scores[v] * inverse;
    return ratio < 1.0 ? ratio : 1.0;
  };
  double sums[kLanes] = {}, sum = 0.0;
  for (int64_t v = 0; v < vocabulary; ++v) sums[v % kLanes] += probability_of(v);
  for (const double part : sums) sum += part;
  // No score, or fewer than `kept`: what is left goes to all alike.
  const double lacking = double(kept) - sum, share = lacking > 1e-6 ? lacking / (double(vocabulary) - sum) : 0.0;
  int64_t rest = kept * kUnit;
  for (int64_t v = 0; v < vocabulary; ++v) {
    double probability = probability_of(v);
    probability += (1.0 - probability) * share;
    // To the nearest, ties to even. A probability of a score is never nothing.
    units[v] = std::llrint(probability * double(kUnit));
    if (units[v] == 0 && scores[v] > 0.0f) units[v] = 1;
    rest -= units[v];
  }
  if (rest == 0) return;
  // What rounding left over or took, `vocabulary` units at most, goes to the likeliest column that can take it and is not sure; else to a
  // sure one.
  int64_t place = 0, best = -2;
  for (int64_t v = 0; v < vocabulary; ++v) {
    const bool takes = units[v] + rest <= kUnit && units[v] + rest > 0;
    const int64_t rank = !takes ? -1 : units[v] < kUnit ? units[v] : 0;
    if (rank > best) best = rank, place = v;
  }
  units[place] += rest;
}

}  // namespace

void draw_columns(const float* scores, int64_t vocabulary, int64_t kept, int64_t uniform, int64_t* units, int64_t* columns, float* weights) {
  std::vector<float> replaced;
  if (!std::isfinite(above(scores, vocabulary, INFINITY).rest)) {
    // Columns whose score is not finite go first, so that it shows in the gradients.
    replaced.resize(size_t(vocabulary));
    for (int64_t v = 0; v < vocabulary; ++v) replaced[size_t(v)] = std::isfinite(scores[v]) ? 0.0f : 1.0f;
    scores = replaced.data();
  }
  include(scores, vocabulary, kept, units);
  int64_t point = uniform, end = 0;
  for (int64_t v = 0, i = 0; v < vocabulary && i < kept; ++v) {
    end += units[v];
    if (end <= point) continue;
    columns[i] = v;
    weights[i++] = float(double(kUnit) / double(units[v]));
    point += kUnit;
  }
}

}  // namespace distill_kernels
