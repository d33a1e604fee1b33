// Panels of elements, in bf16.
#pragma once
#include "kernels/formats.h"
#include "kernels/generic/target.inl"

namespace kt::kernels::KT_TABLE {
namespace {

struct Bf16 {
  static constexpr StorageFormat kRow = {.name = "bf16", .help = "as checkpoints have them"};
};

}  // namespace
}  // namespace kt::kernels::KT_TABLE
