// The storage formats of the expert weights: one row each. Options, help, benchmarks, the weight cache, the status page
// and the tests read this list; a format is found by its name and by nothing else.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "kernels/kernel_table.h"

namespace kt::kernels {

struct StorageFormat {
  std::string_view name;           // The value of --weight-format.
  std::string_view help;           // One line for people.
  std::int64_t element_bytes = 2;  // Of the tables that run it: KernelTable::element_bytes.
  // How its panels are quantised; empty: panels of elements.
  std::optional<QuantFormat> quantised = std::nullopt;
  // Changes whenever the bytes of its panels do: the weight cache's key has it.
  std::uint32_t layout_version = 1;

  // Bytes from one panel to the next of a matrix with k columns, a multiple of 32.
  std::int64_t panel_stride(std::int64_t k) const {
    return quantised ? quant_panel_stride_bytes(k, *quantised) : panel_stride_bytes(k, element_bytes);
  }
};

// Every format; the first is the default.
std::span<const StorageFormat> formats();

// nullptr when there is none of that name.
const StorageFormat* find_format(std::string_view name);

// All names, in the order of the list.
std::string format_names(std::string_view separator);

// Empty, or why the kernels of that name do not run the format: a sentence for people.
std::string why_not_on(const StorageFormat& format, std::string_view kernels);

}  // namespace kt::kernels
