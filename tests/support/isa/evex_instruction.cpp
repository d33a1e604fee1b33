#include "tests/support/isa/evex_instruction.h"

#include <cstring>

namespace kt::test {
namespace {

enum Prefix : std::uint8_t { kNone, k66, kF3, kF2 };

// How large the memory operand is; its size is also what a disp8 counts in.
enum class Size : std::uint8_t { kFull, kHalf, kQuarter, k4, k8, k16, k32 };

enum Trait : std::uint8_t {
  kPlain = 0,
  kImmediate = 1,   // an imm8 follows
  kBroadcasts = 2,  // memory may be one element for all lanes
  kMaskable = 4,
  kAligned = 8,
  kNoSecond = 16,  // vvvv must be unused
};

constexpr std::uint8_t operator|(Trait a, Trait b) {
  return static_cast<std::uint8_t>(static_cast<unsigned>(a) | static_cast<unsigned>(b));
}
constexpr std::uint8_t operator|(std::uint8_t a, Trait b) {
  return static_cast<std::uint8_t>(a | static_cast<unsigned>(b));
}

struct Form {
  std::uint8_t map;
  Prefix prefix;
  std::int8_t w;  // -1: either
  std::uint8_t opcode;
  std::int8_t extension;  // ModRM.reg as part of the opcode, or -1
  Op op;
  std::uint8_t element_bytes;
  Size size;
  std::uint8_t traits;
};

constexpr std::uint8_t kMove = kMaskable | kNoSecond;
constexpr std::uint8_t kMath = kMaskable | kBroadcasts;

constexpr Form kForms[] = {
    // vmovups, vmovaps, vmovdqu8/16/32/64, vmovdqa32/64
    {1, kNone, 0, 0x10, -1, Op::kLoad, 4, Size::kFull, kMove},
    {1, kNone, 0, 0x11, -1, Op::kStore, 4, Size::kFull, kMove},
    {1, kNone, 0, 0x28, -1, Op::kLoad, 4, Size::kFull, kMove | kAligned},
    {1, kNone, 0, 0x29, -1, Op::kStore, 4, Size::kFull, kMove | kAligned},
    {1, kF2, 0, 0x6f, -1, Op::kLoad, 1, Size::kFull, kMove},
    {1, kF2, 0, 0x7f, -1, Op::kStore, 1, Size::kFull, kMove},
    {1, kF2, 1, 0x6f, -1, Op::kLoad, 2, Size::kFull, kMove},
    {1, kF2, 1, 0x7f, -1, Op::kStore, 2, Size::kFull, kMove},
    {1, kF3, 0, 0x6f, -1, Op::kLoad, 4, Size::kFull, kMove},
    {1, kF3, 0, 0x7f, -1, Op::kStore, 4, Size::kFull, kMove},
    {1, kF3, 1, 0x6f, -1, Op::kLoad, 8, Size::kFull, kMove},
    {1, kF3, 1, 0x7f, -1, Op::kStore, 8, Size::kFull, kMove},
    {1, k66, 0, 0x6f, -1, Op::kLoad, 4, Size::kFull, kMove | kAligned},
    {1, k66, 0, 0x7f, -1, Op::kStore, 4, Size::kFull, kMove | kAligned},
    {1, k66, 1, 0x6f, -1, Op::kLoad, 8, Size::kFull, kMove | kAligned},
    {1, k66, 1, 0x7f, -1, Op::kStore, 8, Size::kFull, kMove | kAligned},
    // vmovss, vmovd, vmovq
    {1, kF3, 0, 0x10, -1, Op::kLoadScalar, 4, Size::k4, kPlain},
    {1, kF3, 0, 0x11, -1, Op::kStoreScalar, 4, Size::k4, kPlain},
    {1, k66, 0, 0x6e, -1, Op::kGprToXmm, 4, Size::k4, kNoSecond},
    {1, k66, 1, 0x6e, -1, Op::kGprToXmm, 8, Size::k8, kNoSecond},
    {1, k66, 0, 0x7e, -1, Op::kXmmToGpr, 4, Size::k4, kNoSecond},
    {1, k66, 1, 0x7e, -1, Op::kXmmToGpr, 8, Size::k8, kNoSecond},
    // vbroadcastss, vpbroadcast{d,w}, vbroadcastf32x4, vbroadcasti32x4
    {2, k66, 0, 0x18, -1, Op::kBroadcast, 4, Size::k4, kMove},
    {2, k66, 0, 0x58, -1, Op::kBroadcast, 4, Size::k4, kMove},
    {2, k66, 0, 0x1a, -1, Op::kBroadcast, 4, Size::k16, kMove},
    {2, k66, 0, 0x5a, -1, Op::kBroadcast, 4, Size::k16, kMove},
    {2, k66, 0, 0x7c, -1, Op::kBroadcastGpr, 4, Size::k4, kMove},
    {2, k66, 0, 0x7b, -1, Op::kBroadcastGpr, 2, Size::k4, kMove},
    // v{add,sub,mul,div,sqrt}{ps,ss}, vmaxps, v{xor,and,or}ps
    {1, kNone, 0, 0x58, -1, Op::kAdd, 4, Size::kFull, kMath},
    {1, kNone, 0, 0x5c, -1, Op::kSub, 4, Size::kFull, kMath},
    {1, kNone, 0, 0x59, -1, Op::kMul, 4, Size::kFull, kMath},
    {1, kNone, 0, 0x5e, -1, Op::kDiv, 4, Size::kFull, kMath},
    {1, kNone, 0, 0x5f, -1, Op::kMax, 4, Size::kFull, kMath},
    {1, kNone, 0, 0x51, -1, Op::kSqrt, 4, Size::kFull, kMath | kNoSecond},
    {1, kF3, 0, 0x58, -1, Op::kAddScalar, 4, Size::k4, kPlain},
    {1, kF3, 0, 0x5c, -1, Op::kSubScalar, 4, Size::k4, kPlain},
    {1, kF3, 0, 0x59, -1, Op::kMulScalar, 4, Size::k4, kPlain},
    {1, kF3, 0, 0x5e, -1, Op::kDivScalar, 4, Size::k4, kPlain},
    {1, kNone, 0, 0x57, -1, Op::kXor, 4, Size::kFull, kMath},
    {1, kNone, 0, 0x54, -1, Op::kAnd, 4, Size::kFull, kMath},
    {1, kNone, 0, 0x56, -1, Op::kOr, 4, Size::kFull, kMath},
    // vp{xor,and,or,add,sub}d, vpmaxsd, vpternlogd, vcvtdq2ps, vps{rl,ra,ll}d by an immediate
    {1, k66, 0, 0xef, -1, Op::kXor, 4, Size::kFull, kMath},
    {1, k66, 0, 0xdb, -1, Op::kAnd, 4, Size::kFull, kMath},
    {1, k66, 0, 0xeb, -1, Op::kOr, 4, Size::kFull, kMath},
    {1, k66, 0, 0xfe, -1, Op::kAddInt, 4, Size::kFull, kMath},
    {1, k66, 0, 0xfa, -1, Op::kSubInt, 4, Size::kFull, kMath},
    {2, k66, 0, 0x3d, -1, Op::kMaxInt, 4, Size::kFull, kMath},
    {3, k66, 0, 0x25, -1, Op::kTernary, 4, Size::kFull, kMath | kImmediate},
    {1, kNone, 0, 0x5b, -1, Op::kConvertInt, 4, Size::kFull, kMath | kNoSecond},
    {1, k66, 0, 0x72, 2, Op::kShiftRight, 4, Size::kFull, kMath | kImmediate},
    {1, k66, 0, 0x72, 4, Op::kShiftRightSigned, 4, Size::kFull, kMath | kImmediate},
    {1, k66, 0, 0x72, 6, Op::kShiftLeft, 4, Size::kFull, kMath | kImmediate},
    // vfmadd231ps, vfmadd213ps, vdpbf16ps, vcmpps
    {2, k66, 0, 0xb8, -1, Op::kFma231, 4, Size::kFull, kMath},
    {2, k66, 0, 0xa8, -1, Op::kFma213, 4, Size::kFull, kMath},
    {2, kF3, 0, 0x52, -1, Op::kDot, 4, Size::kFull, kMath},
    {1, kNone, 0, 0xc2, -1, Op::kCompare, 4, Size::kFull, kMath | kImmediate},
    // v{insert,extract}{f,i}32x4, 64x4 and vextractf32x8
    {3, k66, 0, 0x18, -1, Op::kInsert, 4, Size::k16, kImmediate},
    {3, k66, 0, 0x38, -1, Op::kInsert, 4, Size::k16, kImmediate},
    {3, k66, 1, 0x1a, -1, Op::kInsert, 8, Size::k32, kImmediate},
    {3, k66, 1, 0x3a, -1, Op::kInsert, 8, Size::k32, kImmediate},
    {3, k66, 0, 0x19, -1, Op::kExtract, 4, Size::k16, kImmediate | kNoSecond},
    {3, k66, 0, 0x39, -1, Op::kExtract, 4, Size::k16, kImmediate | kNoSecond},
    {3, k66, -1, 0x1b, -1, Op::kExtract, 4, Size::k32, kImmediate | kNoSecond},
    {3, k66, -1, 0x3b, -1, Op::kExtract, 4, Size::k32, kImmediate | kNoSecond},
    // vshufi64x2, valignd, vpmovdw, vpmovzxwd, vpshufb, vpunpck{l,h}qdq
    {3, k66, 1, 0x43, -1, Op::kShuffle128, 8, Size::kFull, kImmediate},
    {3, k66, 0, 0x03, -1, Op::kAlign, 4, Size::kFull, kImmediate},
    {2, kF3, 0, 0x33, -1, Op::kNarrow, 2, Size::kHalf, kNoSecond},
    {2, k66, -1, 0x33, -1, Op::kWiden, 4, Size::kHalf, kNoSecond},
    {2, k66, -1, 0x00, -1, Op::kShuffleBytes, 1, Size::kFull, kPlain},
    {1, k66, 1, 0x6c, -1, Op::kUnpackLow, 8, Size::kFull, kPlain},
    {1, k66, 1, 0x6d, -1, Op::kUnpackHigh, 8, Size::kFull, kPlain},
    // vpmovsxbd, vperm{ps,d}, vcvtne2ps2bf16
    {2, k66, -1, 0x21, -1, Op::kWidenBytes, 4, Size::kQuarter, kNoSecond},
    {2, k66, 0, 0x16, -1, Op::kPermute, 4, Size::kFull, kPlain},
    {2, k66, 0, 0x36, -1, Op::kPermute, 4, Size::kFull, kPlain},
    {2, kF2, 0, 0x72, -1, Op::kRoundTwo, 2, Size::kFull, kPlain},
    // vpmovzxbw, vptestmw, vpblendmd
    {2, k66, -1, 0x30, -1, Op::kWidenUnsignedBytes, 2, Size::kHalf, kNoSecond},
    {2, k66, 1, 0x26, -1, Op::kTestWords, 2, Size::kFull, kPlain},
    {2, k66, 0, 0x64, -1, Op::kBlend, 4, Size::kFull, kMath},
    // vperm{t,i}2{ps,w}
    {2, k66, 1, 0x7d, -1, Op::kPermuteTwo, 2, Size::kFull, kPlain},
    {2, k66, 1, 0x75, -1, Op::kPermuteTwoOver, 2, Size::kFull, kPlain},
    {2, k66, 0, 0x7f, -1, Op::kPermuteTwo, 4, Size::kFull, kPlain},
    {2, k66, 0, 0x77, -1, Op::kPermuteTwoOver, 4, Size::kFull, kPlain},
};

const Form* find_form(unsigned map, unsigned prefix, unsigned w, unsigned opcode, unsigned extension) {
  for (const Form& form : kForms) {
    if (form.map == map && form.prefix == prefix && form.opcode == opcode &&
        (form.w < 0 || form.w == static_cast<int>(w)) &&
        (form.extension < 0 || form.extension == static_cast<int>(extension)))
      return &form;
  }
  return nullptr;
}

std::uint8_t size_in_bytes(Size size, unsigned vector_bytes) {
  switch (size) {
    case Size::kFull:
      return static_cast<std::uint8_t>(vector_bytes);
    case Size::kHalf:
      return static_cast<std::uint8_t>(vector_bytes / 2);
    case Size::kQuarter:
      return static_cast<std::uint8_t>(vector_bytes / 4);
    case Size::k4:
      return 4;
    case Size::k8:
      return 8;
    case Size::k16:
      return 16;
    case Size::k32:
      return 32;
  }
  return 0;
}

std::optional<Instruction> decode_evex(const std::uint8_t* code) {
  const unsigned p0 = code[1], p1 = code[2], p2 = code[3], modrm = code[5];
  if ((p0 & 8) != 0 || (p1 & 4) == 0) return std::nullopt;
  const Form* form = find_form(p0 & 7, p1 & 3, p1 >> 7, code[4], modrm >> 3 & 7);
  const unsigned length = p2 >> 5 & 3;
  const unsigned mod = modrm >> 6;
  if (form == nullptr || length == 3) return std::nullopt;

  const unsigned inverted = ~p0;
  Instruction out{};
  out.op = form->op;
  out.vector_bytes = static_cast<std::uint8_t>(16u << length);
  out.element_bytes = form->element_bytes;
  out.memory_bytes = size_in_bytes(form->size, out.vector_bytes);
  out.reg = static_cast<std::uint8_t>((modrm >> 3 & 7) | (inverted >> 7 & 1) << 3 | (inverted >> 4 & 1) << 4);
  out.second = static_cast<std::uint8_t>((~p1 >> 3 & 15) | (~p2 >> 3 & 1) << 4);
  out.mask = p2 & 7;
  out.zeroing = (p2 >> 7) != 0;
  out.broadcast = (p2 >> 4 & 1) != 0;
  out.aligned = (form->traits & kAligned) != 0;
  if ((out.mask != 0 || out.zeroing) && (form->traits & kMaskable) == 0) return std::nullopt;
  if (out.zeroing && (out.mask == 0 || out.op == Op::kStore || out.op == Op::kCompare)) return std::nullopt;
  if (out.broadcast && ((form->traits & kBroadcasts) == 0 || mod == 3)) return std::nullopt;
  if ((form->traits & kNoSecond) != 0 && out.second != 0) return std::nullopt;

  const std::uint8_t* next = code + 6;
  if (mod == 3) {
    out.rm = static_cast<std::uint8_t>((modrm & 7) | (inverted >> 5 & 1) << 3 | (inverted >> 6 & 1) << 4);
  } else {
    next = decode_memory(next, mod, modrm & 7, (inverted >> 5 & 1) << 3, (inverted >> 6 & 1) << 3, &out);
  }
  if ((form->traits & kImmediate) != 0) out.immediate = *next++;
  out.length = static_cast<std::uint8_t>(next - code);
  return out;
}

// C5 [R vvvv L pp] opcode ModRM, registers only: kmovw k,k / k,r32 / r32,k and kxorw.
std::optional<Instruction> decode_opmask(const std::uint8_t* code) {
  const unsigned p = code[1], modrm = code[3];
  const unsigned second = ~p >> 3 & 15;
  if (modrm >> 6 != 3 || (p & 3) != 0) return std::nullopt;
  Instruction out{};
  out.length = 4;
  out.reg = static_cast<std::uint8_t>(modrm >> 3 & 7);
  out.rm = modrm & 7;
  out.second = second & 7;
  const bool high_reg = (p & 0x80) == 0;  // r8d and above, as the destination of kmovw r32, k
  const bool three_operands = (p & 4) != 0;
  if (three_operands ? (high_reg || second > 7) : second != 0) return std::nullopt;
  if (three_operands && code[2] == 0x47) {
    out.op = Op::kMaskXor;
  } else if (!three_operands && code[2] == 0x93) {
    out.op = Op::kMaskToGpr;
    out.reg = static_cast<std::uint8_t>(out.reg | (high_reg ? 8 : 0));
  } else if (!three_operands && !high_reg && (code[2] == 0x90 || code[2] == 0x92)) {
    out.op = code[2] == 0x90 ? Op::kMaskMove : Op::kMaskFromGpr;
  } else {
    return std::nullopt;
  }
  return out;
}

}  // namespace

const std::uint8_t* decode_memory(const std::uint8_t* next, unsigned mod, unsigned rm, unsigned base_high,
                                  unsigned index_high, Instruction* out) {
  out->memory = true;
  out->base = static_cast<std::int8_t>(rm | base_high);
  out->index = -1;
  bool wide = mod == 2;
  if (rm == 4) {
    const unsigned sib = *next++;
    const unsigned index = (sib >> 3 & 7) | index_high;
    out->scale = static_cast<std::uint8_t>(sib >> 6);
    out->index = static_cast<std::int8_t>(index == 4 ? -1 : static_cast<int>(index));
    out->base = static_cast<std::int8_t>((sib & 7) | base_high);
    if (mod == 0 && (sib & 7) == 5) {
      out->base = -1;
      wide = true;
    }
  } else if (mod == 0 && rm == 5) {
    out->base = -1;
    out->ip_relative = true;
    wide = true;
  }
  if (wide) {
    std::memcpy(&out->displacement, next, 4);
    return next + 4;
  }
  if (mod != 1) return next;
  const int unit = out->broadcast ? out->element_bytes : out->memory_bytes;
  out->displacement = static_cast<std::int8_t>(*next) * unit;
  return next + 1;
}

std::optional<Instruction> decode_evex_or_opmask(const std::uint8_t* code) {
  if (code[0] == 0x62) return decode_evex(code);
  if (code[0] == 0xc5) return decode_opmask(code);
  return std::nullopt;
}

}  // namespace kt::test
