// Reads instructions from stdin, one line of hexadecimal bytes each; prints their lengths, 0 for one that the emulator
// does not know. For check_emulated_instructions.py.
#include <array>
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>

#include "tests/support/isa/emulator.h"

int main() {
  std::string line;
  while (std::getline(std::cin, line)) {
    std::array<std::uint8_t, 16> code{};
    std::istringstream bytes(line);
    bytes >> std::hex;
    unsigned byte = 0;
    for (std::size_t i = 0; i < code.size() && bytes >> byte; ++i) code[i] = static_cast<std::uint8_t>(byte);
    const auto instruction = kt::test::decode_instruction(code.data());
    std::printf("%d\n", instruction ? instruction->length : 0);
  }
}
