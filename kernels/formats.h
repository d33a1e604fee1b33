// The storage formats of the expert weights. Each is a file of kernels/formats and an entry of the list there. Options,
// help, benchmarks, the weight cache, the status page and the tests read that list; a format is found by its name and
// by nothing else.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "kernels/kernel_table.h"

namespace kt::kernels {

struct StorageFormat {
  std::string_view name;                                // The value of --weight-format.
  std::string_view help;                                // One line for people.
  std::int64_t element_bytes = 2;                       // Of the tables that run it: KernelTable::element_bytes.
  std::optional<QuantLayout> quantised = std::nullopt;  // Of its panels; empty: panels of elements.
  // Changes whenever the bytes of its panels do: the weight cache's key has it.
  std::uint32_t layout_version = 1;

  // Bytes from one panel to the next of a matrix with k columns, a multiple of 32.
  std::int64_t panel_stride(std::int64_t k) const {
    return quantised ? quantised->panel_stride(k) : panel_stride_bytes(k, element_bytes);
  }
};

// Every format; the first is the default.
std::span<const StorageFormat> formats();

// nullptr when there is none of that name.
const StorageFormat* find_format(std::string_view name);

// What a table computes with a quantised format; nullptr when the name is of none, or the table has none.
const QuantKernels* find_kernels(const KernelTable& table, std::string_view format);

// All names, in the order of the list.
std::string format_names(std::string_view separator);

// Empty, or why the kernels of that name do not run the format: a sentence for people.
std::string why_not_on(const StorageFormat& format, std::string_view kernels);

}  // namespace kt::kernels
