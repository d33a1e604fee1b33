#include "tests/support/isa/evex_execute.h"

#include <bit>

#include "tests/support/isa/evex_lanes.h"

namespace kt::test {
namespace {

std::uint64_t address_of(const Instruction& in, const VectorRegisters& registers) {
  std::uint64_t address = static_cast<std::uint64_t>(std::int64_t{in.displacement});
  if (in.ip_relative) address += registers.ip() + in.length;
  if (in.base >= 0) address += registers.gpr(in.base);
  if (in.index >= 0) address += registers.gpr(in.index) << in.scale;
  return address;
}

std::uint8_t* pointer_to(std::uint64_t address) {
  return reinterpret_cast<std::uint8_t*>(address);  // NOLINT(performance-no-int-to-ptr): it came from a register
}

bool lane_is_active(const Instruction& in, VectorRegisters& registers, int lane) {
  return in.mask == 0 || (registers.k(in.mask) >> lane & 1) != 0;
}

int num_lanes(const Instruction& in) { return in.vector_bytes / in.element_bytes; }

// The operand that ModRM.rm names, a broadcast element repeated. Masked-off elements of memory are not read.
Zmm read_rm(const Instruction& in, VectorRegisters& registers) {
  if (!in.memory) return registers.zmm(in.rm);
  const std::uint8_t* from = pointer_to(address_of(in, registers));
  Zmm value{};
  if (in.broadcast) {
    for (int at = 0; at < in.vector_bytes; at += in.element_bytes)
      std::memcpy(value.bytes + at, from, in.element_bytes);
  } else if (in.mask != 0 && in.memory_bytes == in.vector_bytes) {
    for (int lane = 0; lane < num_lanes(in); ++lane) {
      const int at = lane * in.element_bytes;
      if (lane_is_active(in, registers, lane)) std::memcpy(value.bytes + at, from + at, in.element_bytes);
    }
  } else {
    std::memcpy(value.bytes, from, in.memory_bytes);
  }
  return value;
}

// Writes the active elements of `value`; others keep their contents or become zero, all above the vector becomes zero.
void write_vector(const Instruction& in, VectorRegisters& registers, int r, const Zmm& value) {
  Zmm result{};
  std::memcpy(result.bytes, value.bytes, in.vector_bytes);
  for (int lane = 0; in.mask != 0 && lane < num_lanes(in); ++lane) {
    if (lane_is_active(in, registers, lane)) continue;
    const int at = lane * in.element_bytes;
    if (in.zeroing) {
      std::memset(result.bytes + at, 0, in.element_bytes);
    } else {
      std::memcpy(result.bytes + at, registers.zmm(r).bytes + at, in.element_bytes);
    }
  }
  registers.zmm(r) = result;
}

// An operation of 128 bits or less on one lane: the rest of the xmm from the second operand.
void write_scalar(const Instruction& in, VectorRegisters& registers, float value) {
  Zmm result{};
  std::memcpy(result.bytes, registers.zmm(in.second).bytes, 16);
  result.set<float>(0, value);
  registers.zmm(in.reg) = result;
}

void execute_compare(const Instruction& in, VectorRegisters& registers) {
  const Zmm a = registers.zmm(in.second);
  const Zmm b = read_rm(in, registers);
  std::uint64_t result = 0;
  for (int lane = 0; lane < num_lanes(in); ++lane) {
    if (lane_is_active(in, registers, lane) && compare(in.immediate, a.get<float>(lane), b.get<float>(lane)))
      result |= std::uint64_t{1} << lane;
  }
  registers.k(in.reg) = result;
}

// Active lanes from the last operand, the others from the one before it, or zero.
void execute_blend(const Instruction& in, VectorRegisters& registers) {
  Zmm result = registers.zmm(in.second);
  const Zmm b = read_rm(in, registers);
  for (int lane = 0; lane < num_lanes(in); ++lane) {
    if (lane_is_active(in, registers, lane)) {
      result.set(lane, b.get<std::uint32_t>(lane));
    } else if (in.zeroing) {
      result.set(lane, std::uint32_t{0});
    }
  }
  Instruction whole = in;
  whole.mask = 0;
  write_vector(whole, registers, in.reg, result);
}

// Which words have a bit in common.
void execute_test_words(const Instruction& in, VectorRegisters& registers) {
  const Zmm a = registers.zmm(in.second);
  const Zmm b = read_rm(in, registers);
  std::uint64_t result = 0;
  for (int lane = 0; lane < num_lanes(in); ++lane) {
    if ((a.get<std::uint16_t>(lane) & b.get<std::uint16_t>(lane)) != 0) result |= std::uint64_t{1} << lane;
  }
  registers.k(in.reg) = result;
}

void execute_lanes(const Instruction& in, VectorRegisters& registers) {
  const Zmm a = registers.zmm(in.second);
  const Zmm b = read_rm(in, registers);
  Zmm result = registers.zmm(in.reg);
  if (in.op == Op::kDot) {
    dot(a, b, &result);
  } else {
    for (int lane = 0; lane < num_lanes(in); ++lane)
      result.set(lane, compute_lane(in, a.get<std::uint32_t>(lane), b.get<std::uint32_t>(lane),
                                    result.get<std::uint32_t>(lane)));
  }
  // The immediate shifts have their destination in vvvv.
  const bool shift = in.op == Op::kShiftRight || in.op == Op::kShiftRightSigned || in.op == Op::kShiftLeft;
  write_vector(in, registers, shift ? in.second : in.reg, result);
}

// Results made of whole elements of the operands, the bytes of one, or both rounded.
Zmm rearrange(const Instruction& in, const Zmm& a, const Zmm& b) {
  Zmm result{};
  const int words = in.vector_bytes / 4;
  for (int lane = 0; lane < in.vector_bytes / 16; ++lane) {  // 128 bits each
    const int at = lane * 16;
    if (in.op == Op::kShuffle128) {  // the lower half of the result from a, the upper from b; 2 bits of immediate each
      const int lanes = in.vector_bytes / 16;
      const int bits = lanes == 4 ? 2 : 1;
      const int chosen = in.immediate >> (lane * bits) & ((1 << bits) - 1);
      std::memcpy(result.bytes + at, (lane < lanes / 2 ? a : b).bytes + chosen * 16, 16);
    } else if (in.op == Op::kUnpackLow || in.op == Op::kUnpackHigh) {
      const int half = in.op == Op::kUnpackHigh ? 8 : 0;
      std::memcpy(result.bytes + at, a.bytes + at + half, 8);
      std::memcpy(result.bytes + at + 8, b.bytes + at + half, 8);
    } else if (in.op == Op::kShuffleBytes) {
      for (int i = 0; i < 16; ++i) {
        const std::uint8_t index = b.bytes[at + i];
        result.bytes[at + i] = (index & 0x80) != 0 ? std::uint8_t{0} : a.bytes[at + (index & 15)];
      }
    }
  }
  if (in.op == Op::kAlign) {  // a : b, shifted right by words
    const int shift = in.immediate & (words - 1);
    for (int w = 0; w < words; ++w) {
      const int from = w + shift;
      result.set(w, from < words ? b.get<std::uint32_t>(from) : a.get<std::uint32_t>(from - words));
    }
  } else if (in.op == Op::kWiden) {
    for (int w = 0; w < words; ++w) result.set(w, std::uint32_t{b.get<std::uint16_t>(w)});
  } else if (in.op == Op::kWidenBytes) {
    for (int w = 0; w < words; ++w) result.set(w, std::int32_t{b.get<std::int8_t>(w)});
  } else if (in.op == Op::kWidenUnsignedBytes) {
    for (int i = 0; i < num_lanes(in); ++i) result.set(i, std::uint16_t{b.bytes[i]});
  } else if (in.op == Op::kPermute) {  // a: which words of b
    for (int w = 0; w < words; ++w)
      result.set(w, b.get<std::uint32_t>(static_cast<int>(a.get<std::uint32_t>(w) % static_cast<unsigned>(words))));
  } else if (in.op == Op::kRoundTwo) {  // b below, a above
    for (int w = 0; w < words; ++w) {
      result.set(w, nearest_bf16(b.get<std::uint32_t>(w)));
      result.set(words + w, nearest_bf16(a.get<std::uint32_t>(w)));
    }
  } else if (in.op == Op::kInsert) {
    result = a;
    const int parts = in.vector_bytes / in.memory_bytes;
    std::memcpy(result.bytes + (in.immediate & (parts - 1)) * in.memory_bytes, b.bytes, in.memory_bytes);
  } else if (in.op == Op::kBroadcast) {
    for (int at = 0; at < in.vector_bytes; at += in.memory_bytes)
      std::memcpy(result.bytes + at, b.bytes, in.memory_bytes);
  }
  return result;
}

// Puts `bytes` bytes where ModRM.rm says: memory, or a register whose other bytes become zero.
void write_rm(const Instruction& in, VectorRegisters& registers, const std::uint8_t* value, std::size_t bytes) {
  if (in.memory) {
    std::memcpy(pointer_to(address_of(in, registers)), value, bytes);
    return;
  }
  Zmm result{};
  std::memcpy(result.bytes, value, bytes);
  registers.zmm(in.rm) = result;
}

void execute_store(const Instruction& in, VectorRegisters& registers) {
  const Zmm value = registers.zmm(in.reg);
  if (!in.memory) return write_vector(in, registers, in.rm, value);
  std::uint8_t* to = pointer_to(address_of(in, registers));
  for (int lane = 0; lane < num_lanes(in); ++lane) {
    const int at = lane * in.element_bytes;
    if (lane_is_active(in, registers, lane)) std::memcpy(to + at, value.bytes + at, in.element_bytes);
  }
}

void execute_narrow(const Instruction& in, VectorRegisters& registers) {
  const Zmm value = registers.zmm(in.reg);
  Zmm narrow{};
  for (int w = 0; w < in.vector_bytes / 4; ++w) narrow.set(w, value.get<std::uint16_t>(2 * w));
  write_rm(in, registers, narrow.bytes, in.memory_bytes);
}

void execute_extract(const Instruction& in, VectorRegisters& registers) {
  const Zmm value = registers.zmm(in.reg);
  const int parts = in.vector_bytes / in.memory_bytes;
  write_rm(in, registers, value.bytes + (in.immediate & (parts - 1)) * in.memory_bytes, in.memory_bytes);
}

// An index of twice the lanes chooses table and lane. The destination is the first table, or the indices.
void execute_permute_two(const Instruction& in, VectorRegisters& registers) {
  const bool over_indices = in.op == Op::kPermuteTwoOver;
  const Zmm first = registers.zmm(over_indices ? in.second : in.reg);
  const Zmm index = registers.zmm(over_indices ? in.reg : in.second);
  const Zmm second = read_rm(in, registers);
  const int lanes = num_lanes(in);
  Zmm result{};
  for (int i = 0; i < lanes; ++i) {
    const int at = i * in.element_bytes;
    int from = 0;  // little-endian
    std::memcpy(&from, index.bytes + at, in.element_bytes);
    from &= 2 * lanes - 1;
    const Zmm& table = from < lanes ? first : second;
    std::memcpy(result.bytes + at, table.bytes + from % lanes * in.element_bytes, in.element_bytes);
  }
  write_vector(in, registers, in.reg, result);
}

float scalar_result(const Instruction& in, float a, float b) {
  Instruction vector = in;
  vector.op = in.op == Op::kAddScalar   ? Op::kAdd
              : in.op == Op::kSubScalar ? Op::kSub
              : in.op == Op::kMulScalar ? Op::kMul
                                        : Op::kDiv;
  return std::bit_cast<float>(
      compute_lane(vector, std::bit_cast<std::uint32_t>(a), std::bit_cast<std::uint32_t>(b), 0));
}

// vmovss, vmovd, vmovq.
void execute_scalar_move(const Instruction& in, VectorRegisters& registers) {
  Zmm result{};
  if (in.op == Op::kLoadScalar) {
    result = read_rm(in, registers);
    if (!in.memory) return write_scalar(in, registers, result.get<float>(0));
    registers.zmm(in.reg) = result;
  } else if (in.op == Op::kStoreScalar) {
    if (!in.memory) {  // to rm, the rest of it from vvvv
      Instruction mirrored = in;
      mirrored.reg = in.rm;
      return write_scalar(mirrored, registers, registers.zmm(in.reg).get<float>(0));
    }
    write_rm(in, registers, registers.zmm(in.reg).bytes, 4);
  } else if (in.op == Op::kGprToXmm) {
    if (in.memory) {
      result = read_rm(in, registers);
    } else {
      const std::uint64_t value = registers.gpr(in.rm);
      std::memcpy(result.bytes, &value, in.memory_bytes);
    }
    registers.zmm(in.reg) = result;
  } else if (in.memory) {
    write_rm(in, registers, registers.zmm(in.reg).bytes, in.memory_bytes);
  } else {
    std::uint64_t value = 0;  // a 32-bit destination is zero-extended
    std::memcpy(&value, registers.zmm(in.reg).bytes, in.memory_bytes);
    registers.set_gpr(in.rm, value);
  }
}

void execute_mask(const Instruction& in, VectorRegisters& registers) {
  constexpr std::uint64_t kWord = 0xffff;  // all of them are the 16-bit forms
  if (in.op == Op::kMaskMove) registers.k(in.reg) = registers.k(in.rm) & kWord;
  if (in.op == Op::kMaskXor) registers.k(in.reg) = (registers.k(in.second) ^ registers.k(in.rm)) & kWord;
  if (in.op == Op::kMaskFromGpr) registers.k(in.reg) = registers.gpr(in.rm) & kWord;
  if (in.op == Op::kMaskToGpr) registers.set_gpr(in.reg, registers.k(in.rm) & kWord);
}

// vpbroadcastd and vpbroadcastw from a general register.
void execute_broadcast_gpr(const Instruction& in, VectorRegisters& registers) {
  Zmm result{};
  const std::uint64_t value = registers.gpr(in.rm);
  for (int at = 0; at < in.vector_bytes; at += in.element_bytes)
    std::memcpy(result.bytes + at, &value, in.element_bytes);
  write_vector(in, registers, in.reg, result);
}

const char* refusal(const Instruction& in, const VectorRegisters& registers) {
  const bool general_register = in.op == Op::kGprToXmm || in.op == Op::kXmmToGpr || in.op == Op::kBroadcastGpr;
  if (general_register && !in.memory && in.rm > 15) return "a general register above r15";
  if (in.op == Op::kBroadcastGpr && in.memory) return "a broadcast from a general register with a memory operand";
  if ((in.op == Op::kExtract || in.op == Op::kInsert) && in.vector_bytes <= in.memory_bytes)
    return "an insertion or extraction as long as the vector";
  if (in.op == Op::kShuffle128 && in.vector_bytes == 16) return "vshufi64x2 of 128 bits";
  if (in.aligned && in.memory && address_of(in, registers) % in.vector_bytes != 0)
    return "an aligned move at an unaligned address (general protection on hardware)";
  return nullptr;
}

}  // namespace

const char* execute_evex(const Instruction& in, VectorRegisters& registers) {
  if (const char* why = refusal(in, registers)) return why;
  switch (in.op) {
    case Op::kLoad:
      write_vector(in, registers, in.reg, read_rm(in, registers));
      break;
    case Op::kStore:
      execute_store(in, registers);
      break;
    case Op::kLoadScalar:
    case Op::kStoreScalar:
    case Op::kGprToXmm:
    case Op::kXmmToGpr:
      execute_scalar_move(in, registers);
      break;
    case Op::kBroadcastGpr:
      execute_broadcast_gpr(in, registers);
      break;
    case Op::kCompare:
      execute_compare(in, registers);
      break;
    case Op::kBlend:
      execute_blend(in, registers);
      break;
    case Op::kTestWords:
      execute_test_words(in, registers);
      break;
    case Op::kAddScalar:
    case Op::kSubScalar:
    case Op::kMulScalar:
    case Op::kDivScalar:
      write_scalar(in, registers,
                   scalar_result(in, registers.zmm(in.second).get<float>(0), read_rm(in, registers).get<float>(0)));
      break;
    case Op::kInsert:
    case Op::kShuffle128:
    case Op::kAlign:
    case Op::kWiden:
    case Op::kWidenBytes:
    case Op::kWidenUnsignedBytes:
    case Op::kPermute:
    case Op::kRoundTwo:
    case Op::kShuffleBytes:
    case Op::kUnpackLow:
    case Op::kUnpackHigh:
    case Op::kBroadcast:
      write_vector(in, registers, in.reg, rearrange(in, registers.zmm(in.second), read_rm(in, registers)));
      break;
    case Op::kPermuteTwo:
    case Op::kPermuteTwoOver:
      execute_permute_two(in, registers);
      break;
    case Op::kExtract:
      execute_extract(in, registers);
      break;
    case Op::kNarrow:
      execute_narrow(in, registers);
      break;
    case Op::kMaskMove:
    case Op::kMaskFromGpr:
    case Op::kMaskToGpr:
    case Op::kMaskXor:
      execute_mask(in, registers);
      break;
    default:
      execute_lanes(in, registers);
  }
  registers.set_ip(registers.ip() + in.length);
  return nullptr;
}

}  // namespace kt::test
