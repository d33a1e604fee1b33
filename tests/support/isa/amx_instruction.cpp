#include "tests/support/isa/amx_instruction.h"

namespace kt::test {
namespace {

enum Prefix : unsigned { kNone = 0, k66 = 1, kF3 = 2, kF2 = 3 };

struct Form {
  unsigned opcode;
  Prefix prefix;
  Op op;
  bool memory;
};

constexpr Form kForms[] = {
    {0x49, kNone, Op::kTileConfigure, true}, {0x49, kNone, Op::kTileRelease, false}, {0x49, kF2, Op::kTileZero, false},
    {0x4b, kF2, Op::kTileLoad, true},        {0x4b, kF3, Op::kTileStore, true},      {0x5c, kF3, Op::kTileDot, false},
};

const Form* find_form(unsigned opcode, unsigned prefix, bool memory) {
  for (const Form& form : kForms)
    if (form.opcode == opcode && form.prefix == prefix && form.memory == memory) return &form;
  return nullptr;
}

// Which of its fields an instruction leaves unused, and must leave at their neutral values.
bool fields_are_legal(const Instruction& in, unsigned rm) {
  switch (in.op) {
    case Op::kTileConfigure:
      return (in.reg & 7) == 0 && in.second == 0;
    case Op::kTileRelease:
      return in.reg == 0 && in.second == 0 && rm == 0;
    case Op::kTileZero:
      return in.reg < 8 && in.second == 0 && rm == 0;
    case Op::kTileLoad:
    case Op::kTileStore:
      return in.reg < 8 && in.second == 0 && rm == 4;
    default:
      return in.reg < 8 && in.second < 8 && in.rm < 8;  // kTileDot
  }
}

}  // namespace

std::optional<Instruction> decode_amx(const std::uint8_t* code) {
  constexpr unsigned kMap0F38 = 2;
  const unsigned p0 = code[1], p1 = code[2], modrm = code[4];
  const bool wide_or_256 = (p1 & 0x84) != 0;
  if (code[0] != 0xc4 || (p0 & 0x1f) != kMap0F38 || wide_or_256) return std::nullopt;
  const unsigned mod = modrm >> 6;
  const Form* form = find_form(code[3], p1 & 3, mod != 3);
  if (form == nullptr) return std::nullopt;

  const unsigned inverted = ~p0;
  const unsigned base_high = (inverted >> 5 & 1) << 3;
  Instruction out{};
  out.op = form->op;
  out.memory_bytes = 1;  // displacements of one byte count bytes
  out.reg = static_cast<std::uint8_t>((modrm >> 3 & 7) | (inverted >> 7 & 1) << 3);
  out.second = static_cast<std::uint8_t>(~p1 >> 3 & 15);
  out.rm = static_cast<std::uint8_t>((modrm & 7) | base_high);
  if (!fields_are_legal(out, modrm & 7)) return std::nullopt;
  const std::uint8_t* next = code + 5;
  if (form->memory) next = decode_memory(next, mod, modrm & 7, base_high, (inverted >> 6 & 1) << 3, &out);
  out.length = static_cast<std::uint8_t>(next - code);
  return out;
}

}  // namespace kt::test
