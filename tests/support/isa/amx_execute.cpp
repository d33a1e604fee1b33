#include "tests/support/isa/amx_execute.h"

#include <atomic>

namespace kt::test {
namespace {

// initial-exec: no access from the signal handler may allocate.
constinit thread_local AmxTiles tiles __attribute__((tls_model("initial-exec")));
std::atomic<bool> tiles_are_permitted{false};

std::uint8_t* pointer_to(std::uint64_t address) {
  return reinterpret_cast<std::uint8_t*>(address);  // NOLINT(performance-no-int-to-ptr): it came from a register
}

std::uint64_t scaled_index(const Instruction& in, const VectorRegisters& registers) {
  return in.index < 0 ? 0 : registers.gpr(in.index) << in.scale;
}

// Without the index, which is the stride of a tile's rows.
std::uint64_t start_of(const Instruction& in, const VectorRegisters& registers) {
  std::uint64_t address = static_cast<std::uint64_t>(std::int64_t{in.displacement});
  if (in.ip_relative) address += registers.ip() + in.length;
  if (in.base >= 0) address += registers.gpr(in.base);
  return address;
}

const char* execute(const Instruction& in, const VectorRegisters& registers) {
  const std::uint64_t start = start_of(in, registers);
  const auto stride = static_cast<std::int64_t>(scaled_index(in, registers));
  switch (in.op) {
    case Op::kTileConfigure:
      return tiles.configure(pointer_to(start + scaled_index(in, registers)));
    case Op::kTileRelease:
      tiles.release();
      return nullptr;
    case Op::kTileZero:
      return tiles.zero(in.reg);
    case Op::kTileLoad:
      return tiles.load(in.reg, pointer_to(start), stride);
    case Op::kTileStore:
      return tiles.store(in.reg, pointer_to(start), stride);
    default:
      return tiles.dot(in.reg, in.rm, in.second);  // kTileDot
  }
}

}  // namespace

const char* execute_amx(const Instruction& in, VectorRegisters& registers) {
  if (!tiles_are_permitted.load(std::memory_order_relaxed))
    return "tiles used before arch_prctl(ARCH_REQ_XCOMP_PERM, 18) was asked for them";
  if (const char* why = execute(in, registers)) return why;
  registers.set_ip(registers.ip() + in.length);
  return nullptr;
}

const AmxTiles& this_threads_tiles() { return tiles; }

void permit_tiles(bool permitted) { tiles_are_permitted.store(permitted, std::memory_order_relaxed); }

}  // namespace kt::test
