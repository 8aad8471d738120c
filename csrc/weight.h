// The weight of the newest model, as a function of how many models the average holds already. Python states the same
// functions in swafast/rules.py; a test holds the two together, bit for bit.
#pragma once

#include <cmath>

#include "element.h"
#include "swafast.h"

namespace swafast {

SWAFAST_HD double clamp_weight(double weight, double low, double high) {
  return weight < low ? low : (weight > high ? high : weight);
}

SWAFAST_HD double rule_weight(const swafast_rule& rule, int64_t num_averaged) {
  if (num_averaged == 0) return 1.0;  // the first update copies, whatever the rule
  const double n = static_cast<double>(num_averaged);
  switch (rule.kind) {
    case SWAFAST_RULE_EQUAL:
      return 1.0 / (n + 1.0);
    case SWAFAST_RULE_POWER_WARMUP:
      return clamp_weight(pow(1.0 + n / rule.terms[2], -rule.terms[3]), rule.terms[0], rule.terms[1]);
    case SWAFAST_RULE_RATIO_WARMUP:
      return clamp_weight(9.0 / (10.0 + n), rule.terms[0], rule.terms[1]);
    case SWAFAST_RULE_POWER:
      return -expm1((rule.terms[0] + 1.0) * log1p(-1.0 / (n + 1.0)));
    default:  // SWAFAST_RULE_CONSTANT
      return rule.terms[0];
  }
}

}  // namespace swafast
