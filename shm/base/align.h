// Rounding of sizes and offsets.
#pragma once
#include <cstdint>

namespace kt {

// The least multiple of `alignment` (> 0) that is >= value. The caller keeps value + alignment below 2^64.
constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

constexpr std::uint64_t ceil_div(std::uint64_t value, std::uint64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace kt
