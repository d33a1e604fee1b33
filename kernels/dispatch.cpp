// Chooses a table once, at start.
#include <array>

#include "kernels/cpu_features.h"
#include "kernels/kernel_table.h"

namespace kt::kernels {

namespace amx {
extern const KernelTable kTable;
}
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace scalar {
extern const KernelTable kTable;
}
namespace scalar_fp32 {
extern const KernelTable kTable;
}

namespace {

// Best first within each element size.
constexpr std::array<const KernelTable*, 5> kBestFirst = {&amx::kTable, &avx512::kTable, &avx2::kTable, &scalar::kTable,
                                                          &scalar_fp32::kTable};

void set(std::string* why, std::string text) {
  if (why != nullptr) *why = std::move(text);
}

std::string element_name(std::int64_t element_bytes) { return element_bytes == 4 ? "fp32" : "bf16"; }

}  // namespace

std::span<const KernelTable* const> all_tables() { return kBestFirst; }

const KernelTable* find_table(std::string_view name, std::int64_t element_bytes, std::string* why) {
  const bool best = name.empty() || name == "auto";
  std::string names;
  for (const KernelTable* table : kBestFirst) {
    if (table->element_bytes != element_bytes) continue;
    const std::string missing = missing_cpu_features(table->required);
    if ((best || table->name == name) && missing.empty()) return table;
    if (table->name == name) {
      set(why, std::string(name) + " needs what this CPU lacks: " + missing);
      return nullptr;
    }
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  set(why, "no kernels named '" + std::string(name) + "' for " + element_name(element_bytes) +
               " weights; there are: auto, " + names);
  return nullptr;
}

}  // namespace kt::kernels
