#include "tests/support/formats/format_reference.h"

#include <algorithm>
#include <cmath>

#include "shm/base/result.h"

namespace kt::test {
namespace {

// int8 may deviate by 1.5e-2 forward and 2e-2 backward; int4 has a sixteenth of its integers and 15 times its error.
// fp8's 3 bits of mantissa round a weight by up to 2^-4 of it, on average over a binade by 2.6e-2 in root mean square;
// a layer adds up the errors of gate, up and down.
constexpr FormatReference kReferences[] = {
    {"int8", quantise_int8, int8_code, integer_scale, 1.5e-2, 2e-2, 1.9},
    {"int4", quantise_int4, int4_code, integer_scale, 0.2, 0.2, 3.6},
    {"fp8", quantise_fp8, fp8_code, fp8_scale, 6e-2, 6e-2, 1.9},
};

}  // namespace

std::span<const FormatReference> format_references() { return kReferences; }

const FormatReference& format_reference(std::string_view name) {
  const auto* const found = std::ranges::find(kReferences, name, &FormatReference::name);
  KT_CHECK(found != std::end(kReferences));
  return *found;
}

float nearest_bf16(double x) {
  if (!std::isfinite(x) || x == 0) return static_cast<float>(x);
  int exponent = 0;
  const double digits = std::ldexp(std::frexp(x, &exponent), 8);  // 8 binary digits
  return static_cast<float>(std::ldexp(std::nearbyint(digits), exponent - 8));
}

}  // namespace kt::test
