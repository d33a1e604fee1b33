#include "kernels/formats.h"

#include <algorithm>
#include <array>

#include "kernels/formats/list.inl"

namespace kt::kernels {
namespace {

template <class... Format>
constexpr std::array<StorageFormat, sizeof...(Format)> rows_of(alone::FormatList<Format...>) {
  return {Format::kRow...};
}
constexpr auto kFormats = rows_of(alone::AllFormats{});

}  // namespace

std::span<const StorageFormat> formats() { return kFormats; }

const StorageFormat* find_format(std::string_view name) {
  const auto* const found = std::ranges::find(kFormats, name, &StorageFormat::name);
  return found == kFormats.end() ? nullptr : found;
}

const QuantKernels* find_kernels(const KernelTable& table, std::string_view format) {
  const auto found = std::ranges::find(table.formats, format, &QuantKernels::format);
  return found == table.formats.end() ? nullptr : &*found;
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
