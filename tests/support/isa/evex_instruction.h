// Decodes the EVEX (AVX-512) and opmask instructions that the compiled avx512 and amx tables contain, and nothing else.
//
//   62 P0 P1 P2 opcode ModRM [SIB] [disp8·N | disp32] [imm8]
//   P0 = R X B R' 0 map(3)      P1 = W vvvv 1 pp      P2 = z L'L b V' aaa        (R X B R' vvvv V' inverted)
//
// Strict: a form that is not in the list of evex_instruction.cpp, a rounding override, a mask or broadcast where the
// list allows none is "unknown", never a guess.
#pragma once
#include <cstdint>
#include <optional>

namespace kt::test {

enum class Op : std::uint8_t {
  // Moves: register or memory to register, and back.
  kLoad,
  kStore,
  kLoadScalar,
  kStoreScalar,
  kGprToXmm,
  kXmmToGpr,
  kBroadcast,
  kBroadcastGpr,
  // Lane by lane, 32 bits.
  kAdd,
  kSub,
  kMul,
  kDiv,
  kSqrt,
  kXor,
  kAnd,
  kOr,
  kAddInt,
  kSubInt,
  kMaxInt,
  kMax,
  kTernary,
  kConvertInt,
  kShiftRight,
  kShiftRightSigned,
  kShiftLeft,
  kFma231,
  kFma213,
  kDot,
  kCompare,
  kTestWords,
  kBlend,
  // One lane, the rest from the second operand.
  kAddScalar,
  kSubScalar,
  kMulScalar,
  kDivScalar,
  // Across lanes.
  kInsert,
  kExtract,
  kShuffle128,
  kAlign,
  kNarrow,
  kWiden,
  kWidenBytes,
  kWidenUnsignedBytes,
  kShuffleBytes,
  kUnpackLow,
  kUnpackHigh,
  kPermute,
  kRoundTwo,
  kPermuteTwo,
  kPermuteTwoOver,
  // Opmask registers, VEX-encoded.
  kMaskMove,
  kMaskFromGpr,
  kMaskToGpr,
  kMaskXor,
  // Tiles: amx_instruction.h.
  kTileConfigure,
  kTileRelease,
  kTileZero,
  kTileLoad,
  kTileStore,
  kTileDot,
};

constexpr bool is_tile(Op op) { return op >= Op::kTileConfigure; }

struct Instruction {
  Op op;
  std::uint8_t length;         // bytes
  std::uint8_t vector_bytes;   // 16, 32 or 64
  std::uint8_t element_bytes;  // what one mask bit covers
  std::uint8_t memory_bytes;   // of the memory operand, before a broadcast
  std::uint8_t reg;            // ModRM.reg: a vector, mask or general register
  std::uint8_t second;         // vvvv
  std::uint8_t rm;             // ModRM.rm, if it is a register
  std::uint8_t mask;           // 0: none
  bool zeroing;
  bool broadcast;  // one memory element for all lanes
  bool aligned;    // faults on an unaligned address
  std::uint8_t immediate;
  // The memory operand: base + (index << scale) + displacement; -1: no such register.
  bool memory;
  bool ip_relative;
  std::int8_t base;
  std::int8_t index;
  std::uint8_t scale;
  std::int32_t displacement;
};

// nullopt: not an instruction of the list. Reads at most 15 bytes.
std::optional<Instruction> decode_evex_or_opmask(const std::uint8_t* code);

// SIB and displacement of the memory operand whose ModRM stands before `next`; returns what follows. base_high and
// index_high: 8 where the prefix extends these registers. A disp8 counts in out->memory_bytes or broadcast elements.
const std::uint8_t* decode_memory(const std::uint8_t* next, unsigned mod, unsigned rm, unsigned base_high,
                                  unsigned index_high, Instruction* out);

}  // namespace kt::test
