#include "tests/support/isa/evex_emulator.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "tests/support/isa/evex_execute.h"

namespace kt::test {
namespace {

// Instructions per trap: more would only delay signals.
constexpr int kRunMax = 256;

std::atomic<std::uint64_t> num_traps{0};
std::atomic<std::uint64_t> num_instructions{0};
std::atomic<std::uint64_t> num_dots{0};

const std::uint8_t* code_at(std::uint64_t ip) {
  return reinterpret_cast<const std::uint8_t*>(ip);  // NOLINT(performance-no-int-to-ptr): it is the program counter
}

[[noreturn]] void give_up(std::uint64_t ip, const char* why) {
  char text[256];
  const std::uint8_t* b = code_at(ip);
  const int length = std::snprintf(
      text, sizeof text,
      "EVEX emulator: %s\n  at %#llx: %02x %02x %02x %02x %02x %02x %02x %02x %02x %02x %02x\n"
      "  objdump -d of the avx512 table shows its mnemonic; evex_instruction.cpp lists what is known\n",
      why, static_cast<unsigned long long>(ip), b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10]);
  if (write(STDERR_FILENO, text, static_cast<std::size_t>(length)) < 0) std::abort();
  std::abort();
}

void on_illegal_instruction(int, siginfo_t*, void* argument) {
  ucontext_t& context = *static_cast<ucontext_t*>(argument);
  const auto ip = static_cast<std::uint64_t>(context.uc_mcontext.gregs[REG_RIP]);
  if (!VectorRegisters::frame_is_usable(context))
    give_up(ip, "the signal frame has no AVX state, or MXCSR asks for another rounding than the tables are made for");
  VectorRegisters registers(&context);
  std::uint64_t executed = 0;
  std::uint64_t dots = 0;
  for (int i = 0; i < kRunMax; ++i) {
    const std::optional<Instruction> instruction = decode_instruction(code_at(registers.ip()));
    if (!instruction && i > 0) break;  // the processor's own: continue there
    if (!instruction) give_up(registers.ip(), "unknown instruction");
    if (const char* why = execute_instruction(*instruction, registers)) give_up(registers.ip(), why);
    ++executed;
    if (instruction->op == Op::kDot) ++dots;
  }
  num_traps.fetch_add(1, std::memory_order_relaxed);
  num_instructions.fetch_add(executed, std::memory_order_relaxed);
  num_dots.fetch_add(dots, std::memory_order_relaxed);
}

}  // namespace

bool install_evex_emulator() {
  static const bool installed = [] {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
    struct sigaction action {};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGILL, &action, nullptr) == 0;
  }();
  return installed;
}

EmulatorCounts evex_emulator_counts() {
  return {.traps = num_traps.load(), .instructions = num_instructions.load(), .dots = num_dots.load()};
}

}  // namespace kt::test
