#include "tests/support/isa/vector_registers.h"

#include <cpuid.h>

namespace kt::test {
namespace {

constexpr int kNumFrameRegisters = 16;
constexpr std::size_t kHeaderOffset = 512;     // the XSAVE header follows the legacy area; its first word is XSTATE_BV
constexpr std::size_t kSoftwareOffset = 464;   // struct _fpx_sw_bytes of Linux uapi/asm/sigcontext.h
constexpr std::uint32_t kMagic = 0x46505853u;  // FP_XSTATE_MAGIC1: the frame has more than the legacy area
constexpr std::uint64_t kSse = 1u << 1;
constexpr std::uint64_t kAvx = 1u << 2;
constexpr std::uint32_t kRoundingBits = 0xe040;  // FTZ, rounding control, DAZ of MXCSR

struct Shadow {
  Zmm zmm[32];
  std::uint64_t k[8];
};
thread_local Shadow shadow;

// Hardware number to index of gregs.
constexpr int kGpr[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                          REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// The signal frame has XSAVE's standard format: components lie where CPUID says.
std::size_t high_halves_offset() {
  static const std::size_t offset = [] {
    std::uint32_t a = 0, b = 0, c = 0, d = 0;
    __get_cpuid_count(13, 2, &a, &b, &c, &d);
    return std::size_t{b};
  }();
  return offset;
}

std::uint8_t* frame_bytes(const ucontext_t& context) {
  return static_cast<std::uint8_t*>(static_cast<void*>(context.uc_mcontext.fpregs));
}

}  // namespace

bool VectorRegisters::frame_is_usable(const ucontext_t& context) {
  if (context.uc_mcontext.fpregs == nullptr) return false;
  std::uint32_t magic;
  std::uint64_t features;
  std::memcpy(&magic, frame_bytes(context) + kSoftwareOffset, sizeof magic);
  std::memcpy(&features, frame_bytes(context) + kSoftwareOffset + 8, sizeof features);
  return magic == kMagic && (features & kAvx) != 0 && high_halves_offset() != 0 &&
         (context.uc_mcontext.fpregs->mxcsr & kRoundingBits) == 0;
}

VectorRegisters::VectorRegisters(ucontext_t* context) : context_(context) {
  const std::uint8_t* frame = frame_bytes(*context);
  std::uint64_t present;
  std::memcpy(&present, frame + kHeaderOffset, sizeof present);
  const std::uint8_t* high = frame + high_halves_offset();
  for (int r = 0; r < kNumFrameRegisters; ++r) {
    std::uint8_t low[32] = {};
    std::memcpy(low, &context->uc_mcontext.fpregs->_xmm[r], 16);
    if ((present & kAvx) != 0) std::memcpy(low + 16, high + r * 16, 16);  // absent: all upper halves are zero
    Zmm& zmm = shadow.zmm[r];
    if (std::memcmp(zmm.bytes, low, sizeof low) == 0) continue;
    zmm = Zmm{};
    std::memcpy(zmm.bytes, low, sizeof low);
  }
}

VectorRegisters::~VectorRegisters() {
  std::uint8_t* frame = frame_bytes(*context_);
  for (int r = 0; r < kNumFrameRegisters; ++r) {
    std::memcpy(&context_->uc_mcontext.fpregs->_xmm[r], shadow.zmm[r].bytes, 16);
    std::memcpy(frame + high_halves_offset() + r * 16, shadow.zmm[r].bytes + 16, 16);
  }
  std::uint64_t present;
  std::memcpy(&present, frame + kHeaderOffset, sizeof present);
  present |= kSse | kAvx;
  std::memcpy(frame + kHeaderOffset, &present, sizeof present);
}

Zmm& VectorRegisters::zmm(int r) { return shadow.zmm[r]; }
std::uint64_t& VectorRegisters::k(int r) { return shadow.k[r]; }

std::uint64_t VectorRegisters::gpr(int r) const {
  return static_cast<std::uint64_t>(context_->uc_mcontext.gregs[kGpr[r]]);
}

void VectorRegisters::set_gpr(int r, std::uint64_t value) {
  context_->uc_mcontext.gregs[kGpr[r]] = static_cast<greg_t>(value);
}

std::uint64_t VectorRegisters::ip() const { return static_cast<std::uint64_t>(context_->uc_mcontext.gregs[REG_RIP]); }

void VectorRegisters::set_ip(std::uint64_t ip) { context_->uc_mcontext.gregs[REG_RIP] = static_cast<greg_t>(ip); }

}  // namespace kt::test
