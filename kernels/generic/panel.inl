// The element of a table, and the sizes of its panels (kernel_table.h draws them).
#pragma once
#include "kernels/generic/target.inl"
#include "kernels/kernel_table.h"

namespace kt::kernels::KT_TABLE {
namespace {

#if KT_ELEMENT_BYTES == 2
using Element = std::uint16_t;  // the bits of a bf16
#else
using Element = float;
#endif

constexpr std::int64_t kLineBytes = 64;  // of a cache
// A panel consists of 4-byte units, 32 (one per weight row) for each step of k: two bf16 neighbours in k, or one float.
constexpr std::int64_t kElementsPerUnit = 4 / static_cast<std::int64_t>(sizeof(Element));
constexpr std::int64_t kPairBytes = kPanelRows * 4;  // one unit of all rows: in bf16 a pair of k; two cache lines
constexpr std::int64_t kBlockBytes = kPanelRows * kPanelRows * static_cast<std::int64_t>(sizeof(Element));  // 32 of k

}  // namespace
}  // namespace kt::kernels::KT_TABLE
