// The weight of the newest model, as a function of how many models the average holds already. Python states the same
// functions in swafast/terms/weight.py; a test holds the two together, bit for bit.
//
// No function of a mathematics library: those differ in their last bits from one to the next. Only + - * / of double,
// which every machine rounds alike, and which the build flags keep from being fused.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "element.h"
#include "swafast.h"

namespace swafast {

SWAFAST_HD double double_of(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SWAFAST_HD double power_of_two(int64_t exponent) { return double_of(static_cast<uint64_t>(exponent + 1023) << 52); }

// ln 2 in two parts; the first ends in 21 zero bits, so that its product with an exponent is exact.
struct Ln2 {
  static constexpr double kHigh = 0x1.62e42feep-1, kLow = 0x1.a39ef35793c76p-33;
};

// log(1 + x) for x >= 0.
SWAFAST_HD double log1p_of(double x) {
  x = x < 1e300 ? x : 1e300;
  const double y = 1.0 + x;
  const double part = y - 1.0;
  const double lost = (1.0 - (y - part)) + (x - part);  // what rounding took from the sum
  uint64_t bits;
  memcpy(&bits, &y, sizeof bits);
  int64_t exponent = static_cast<int64_t>(bits >> 52) - 1022;
  double mantissa = double_of((bits & 0xfffffffffffffull) | (1022ull << 52));
  if (mantissa < 0x1.6a09e667f3bcdp-1) {  // sqrt(1/2)
    mantissa = 2.0 * mantissa;
    exponent -= 1;
  }
  const double f = mantissa - 1.0;
  const double s = f / (2.0 + f);
  const double z = s * s;
  double series = 0.0;
  SWAFAST_UNROLL
  for (int k = 21; k > 1; k -= 2) series = (series + 2.0 / k) * z;
  const double near = f - s * (f - series);
  const auto e = static_cast<double>(exponent);
  return e * Ln2::kHigh + (near + (e * Ln2::kLow + lost / y));
}

// e^x = scale + scale * rest for x <= 0; scale is a power of two, or 0.
struct ExpParts {
  double scale, rest;
};

SWAFAST_HD ExpParts exp_parts(double x) {
  if (x < -708.0) return {0.0, 0.0};
  const double k = floor(x * 0x1.71547652b82fep+0 + 0.5);
  const double r = (x - k * Ln2::kHigh) - k * Ln2::kLow;
  double series = 0.0, factorial = 87178291200.0;  // 14!
  SWAFAST_UNROLL
  for (int n = 14; n > 1; --n) {
    series = series * r + 1.0 / factorial;
    factorial = factorial / n;
  }
  return {power_of_two(static_cast<int64_t>(k)), r + (r * r) * series};
}

SWAFAST_HD double exp_of(double x) {
  const ExpParts parts = exp_parts(x);
  return parts.scale + parts.scale * parts.rest;
}

SWAFAST_HD double expm1_of(double x) {
  const ExpParts parts = exp_parts(x);
  return (parts.scale - 1.0) + parts.scale * parts.rest;
}

// sin(pi / 2 * x) for 0 <= x <= 1.
SWAFAST_HD double sine_of(double x) {
  const double r = 0x1.921fb54442d18p+0 * x;
  const double z = r * r;
  double series = 1.0;
  SWAFAST_UNROLL
  for (int k = 24; k > 0; k -= 2) series = 1.0 - (z * (1.0 / (k * (k + 1)))) * series;
  return r * series;
}

SWAFAST_HD double clamp_weight(double weight, double low, double high) {
  return weight < low ? low : (weight > high ? high : weight);
}

SWAFAST_HD double rule_weight(const swafast_rule& rule, int64_t num_averaged) {
  if (num_averaged == 0) return 1.0;  // the first update copies, whatever the rule
  const auto n = static_cast<double>(num_averaged);
  switch (rule.kind) {
    case SWAFAST_RULE_EQUAL:
      return 1.0 / (n + 1.0);
    case SWAFAST_RULE_POWER_WARMUP:
      return clamp_weight(exp_of(-rule.terms[3] * log1p_of(n / rule.terms[2])), rule.terms[0], rule.terms[1]);
    case SWAFAST_RULE_RATIO_WARMUP:
      return clamp_weight(9.0 / (10.0 + n), rule.terms[0], rule.terms[1]);
    case SWAFAST_RULE_POWER:
      return -expm1_of(-(rule.terms[0] + 1.0) * log1p_of(1.0 / n));
    case SWAFAST_RULE_RAMP_WARMUP: {
      const double low = rule.terms[0];
      return clamp_weight(low + (1.0 - low) * exp_of(-(n / rule.terms[2])), low, rule.terms[1]);
    }
    case SWAFAST_RULE_COSINE:
    case SWAFAST_RULE_LINEAR: {
      const double rest = rule.terms[1] - n;
      const double left = (rest > 0.0 ? rest : 0.0) / rule.terms[1];
      const double sine = sine_of(left);
      return rule.terms[0] * (rule.kind == SWAFAST_RULE_COSINE ? sine * sine : left);
    }
    default:  // SWAFAST_RULE_CONSTANT
      return rule.terms[0];
  }
}

}  // namespace swafast
