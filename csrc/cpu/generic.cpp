// Any processor: scalar loops, which a compiler may vectorise (it does on aarch64, where fma is a base instruction).
#include "span.h"
#include "spread.h"
#include "sums.h"

namespace swafast::cpu {

const Kernels& generic_kernels() {
  static const Kernels kernels = with_spread<Scalar>(with_sums<Scalar>(make_kernels<Scalar>("generic")));
  return kernels;
}

}  // namespace swafast::cpu
