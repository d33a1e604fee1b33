// Numbers as they stand in messages.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace kt::coproc {

std::string number_text(double value);                            // The shortest that reads back as the same number.
std::string seconds_text(std::uint64_t ns);                       // "1.2 s"
std::string join_ranks(const std::vector<std::uint32_t>& ranks);  // "0,1,2"

}  // namespace kt::coproc
