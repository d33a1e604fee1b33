#include "tests/support/isa/emulator.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "tests/support/isa/amx_execute.h"
#include "tests/support/isa/amx_instruction.h"
#include "tests/support/isa/evex_execute.h"

namespace kt::test {
namespace {

// Instructions per trap: more would only delay signals.
constexpr int kRunMax = 256;

std::atomic<std::uint64_t> num_traps{0};
std::atomic<std::uint64_t> num_instructions{0};
std::atomic<std::uint64_t> num_vector_dots{0};
std::atomic<std::uint64_t> num_tile_dots{0};
bool avx512_is_emulated = false;  // written before the handler is installed

const std::uint8_t* code_at(std::uint64_t ip) {
  return reinterpret_cast<const std::uint8_t*>(ip);  // NOLINT(performance-no-int-to-ptr): it is the program counter
}

[[noreturn]] void give_up(std::uint64_t ip, const char* why) {
  char text[256];
  const std::uint8_t* b = code_at(ip);
  const int length = std::snprintf(
      text, sizeof text,
      "emulator: %s\n  at %#llx: %02x %02x %02x %02x %02x %02x %02x %02x %02x %02x %02x\n"
      "  objdump -d of the table shows its mnemonic; {evex,amx}_instruction.cpp list what is known\n",
      why, static_cast<unsigned long long>(ip), b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10]);
  if (write(STDERR_FILENO, text, static_cast<std::size_t>(length)) < 0) std::abort();
  std::abort();
}

// What is ours at the program counter; what the CPU has itself is not.
std::optional<Instruction> next_instruction(const VectorRegisters& registers) {
  const std::optional<Instruction> instruction = decode_instruction(code_at(registers.ip()));
  if (instruction && !is_tile(instruction->op) && !avx512_is_emulated) return std::nullopt;
  return instruction;
}

void on_illegal_instruction(int, siginfo_t*, void* argument) {
  ucontext_t& context = *static_cast<ucontext_t*>(argument);
  const auto ip = static_cast<std::uint64_t>(context.uc_mcontext.gregs[REG_RIP]);
  if (!VectorRegisters::frame_is_usable(context))
    give_up(ip, "the signal frame has no AVX state, or MXCSR asks for another rounding than the tables are made for");
  VectorRegisters registers(&context);
  std::uint64_t executed = 0;
  std::uint64_t vector_dots = 0;
  std::uint64_t tile_dots = 0;
  for (int i = 0; i < kRunMax; ++i) {
    const std::optional<Instruction> instruction = next_instruction(registers);
    if (!instruction && i > 0) break;  // the processor's own: continue there
    if (!instruction) give_up(registers.ip(), "unknown instruction");
    const char* why =
        is_tile(instruction->op) ? execute_amx(*instruction, registers) : execute_evex(*instruction, registers);
    if (why != nullptr) give_up(registers.ip(), why);
    ++executed;
    if (instruction->op == Op::kDot) ++vector_dots;
    if (instruction->op == Op::kTileDot) ++tile_dots;
  }
  num_traps.fetch_add(1, std::memory_order_relaxed);
  num_instructions.fetch_add(executed, std::memory_order_relaxed);
  num_vector_dots.fetch_add(vector_dots, std::memory_order_relaxed);
  num_tile_dots.fetch_add(tile_dots, std::memory_order_relaxed);
}

}  // namespace

bool install_emulator() {
  static const bool installed = [] {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
    avx512_is_emulated = !__builtin_cpu_supports("avx512f");
    struct sigaction action {};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGILL, &action, nullptr) == 0;
  }();
  return installed;
}

bool emulates_avx512() { return install_emulator() && avx512_is_emulated; }

std::optional<Instruction> decode_instruction(const std::uint8_t* code) {
  if (auto instruction = decode_amx(code)) return instruction;
  return decode_evex_or_opmask(code);
}

EmulatorCounts emulator_counts() {
  return {.traps = num_traps.load(),
          .instructions = num_instructions.load(),
          .vector_dots = num_vector_dots.load(),
          .tile_dots = num_tile_dots.load()};
}

}  // namespace kt::test
