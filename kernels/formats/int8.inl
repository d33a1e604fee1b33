// Integers of 8 bits.
#pragma once
#include "kernels/formats/integers.inl"

namespace kt::kernels::KT_TABLE {
namespace {

struct Int8 : Integers<8> {
  static constexpr StorageFormat kRow = {
      .name = "int8", .help = "half the memory", .quantised = kLayout, .layout_version = kIntegersVersion};
};

}  // namespace
}  // namespace kt::kernels::KT_TABLE
