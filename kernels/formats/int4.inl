// Integers of 4 bits.
#pragma once
#include "kernels/formats/integers.inl"

namespace kt::kernels::KT_TABLE {
namespace {

struct Int4 : Integers<4> {
  static constexpr StorageFormat kRow = {
      .name = "int4", .help = "a quarter of the memory", .quantised = kLayout, .layout_version = kIntegersVersion};
};

}  // namespace
}  // namespace kt::kernels::KT_TABLE
