// Text that may come from anywhere, made fit for a fixed field, one line of a message, or JSON.
#pragma once
#include <cstddef>
#include <string>
#include <string_view>

namespace kt::shm {

// The longest prefix of at most `bytes_max` bytes that does not end inside a UTF-8 sequence.
std::string_view cut_utf8(std::string_view text, std::size_t bytes_max);

// The text with every byte that is not part of a valid UTF-8 sequence replaced by U+FFFD.
std::string valid_utf8(std::string_view text);

// The text with control characters, newlines among them, replaced by spaces.
std::string one_line(std::string_view text);

}  // namespace kt::shm
