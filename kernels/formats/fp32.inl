// Panels of elements, in fp32: the whole computation is.
#pragma once
#include "kernels/formats.h"
#include "kernels/generic/target.inl"

namespace kt::kernels::KT_TABLE {
namespace {

struct Fp32 {
  static constexpr StorageFormat kRow = {.name = "fp32", .help = "slow and exact", .element_bytes = 4};
};

}  // namespace
}  // namespace kt::kernels::KT_TABLE
