#include "coproc/bench/elements.h"

#include <random>

namespace kt::coproc {

std::vector<std::byte> random_elements(std::int64_t count, std::int64_t element_bytes, std::uint64_t seed) {
  constexpr std::uint64_t kBase = 0x3c00;  // bf16 2^-7
  constexpr std::uint64_t kFree = 0x80ff;  // sign, lowest bit of the exponent, fraction
  std::vector<std::byte> elements(static_cast<std::size_t>(count * element_bytes));
  std::mt19937_64 random(seed);
  // Little-endian: bf16 is the upper half of fp32, the lower half stays zero.
  for (std::size_t at = static_cast<std::size_t>(element_bytes) - 2; at < elements.size();
       at += static_cast<std::size_t>(element_bytes)) {
    const std::uint64_t bits = kBase | (random() >> 32 & kFree);
    elements[at] = static_cast<std::byte>(bits & 0xff);
    elements[at + 1] = static_cast<std::byte>(bits >> 8);
  }
  return elements;
}

}  // namespace kt::coproc
