#include "kernels/formats.h"

#include <algorithm>

namespace kt::kernels {
namespace {

// Groups of integers are the longest there are: their scales add 3 % to the bytes of int8 and 6 % to those of int4.
constexpr StorageFormat kFormats[] = {
    {.name = "bf16", .help = "as checkpoints have them"},
    {.name = "fp32", .help = "slow and exact", .element_bytes = 4},
    {.name = "int8",
     .help = "half the memory",
     .quantised = QuantFormat{.bits = 8, .group = kQuantGroupMax},
     .layout_version = kQuantLayoutVersion},
    {.name = "int4",
     .help = "a quarter of the memory",
     .quantised = QuantFormat{.bits = 4, .group = kQuantGroupMax},
     .layout_version = kQuantLayoutVersion},
};

}  // namespace

std::span<const StorageFormat> formats() { return kFormats; }

const StorageFormat* find_format(std::string_view name) {
  const auto* const found =
      std::find_if(std::begin(kFormats), std::end(kFormats), [&](const auto& format) { return format.name == name; });
  return found == std::end(kFormats) ? nullptr : found;
}

std::string format_names(std::string_view separator) {
  std::string names;
  for (const StorageFormat& format : kFormats) {
    if (!names.empty()) names += separator;
    names += format.name;
  }
  return names;
}

std::string why_not_on(const StorageFormat& format, std::string_view kernels) {
  if (kernels == "auto") return "";
  std::string names;
  for (const KernelTable* table : all_tables()) {
    if (table->element_bytes != format.element_bytes) continue;
    if (table->name == kernels) return "";
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  return "weight format " + std::string(format.name) + " runs on the " + names + " kernels only";
}

}  // namespace kt::kernels
