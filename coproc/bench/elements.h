// Random elements for weights and activations.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kt::coproc {

// `count` elements of either sign, 2^-7 to 2^-5 in size: no sum of products comes near a subnormal or an overflow.
std::vector<std::byte> random_elements(std::int64_t count, std::int64_t element_bytes, std::uint64_t seed);

}  // namespace kt::coproc
