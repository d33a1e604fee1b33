// Every storage format, the default first: --help, options and benchmarks show them in this order.
//
// A format is a struct with kRow (formats.h). If kRow is quantised, it also has
//   kScalePanels                     how many panels share a group's scales: 1 or more
//   quantise(QuantGroup)             writes scales and codes (generic/quantised.inl)
//   Scales(const std::byte* group)   a group's scales as decode uses them
//   decode(block, Scales, out)       64 bytes of codes as lines of a panel of bf16
// and for tables of 16 lanes, where products take the lines from registers,
//   Converted(block)                 what can be made of the codes before their scales are known
//   line(Converted, Scales, number)  a line of a panel: __m512bh
#pragma once
#include "kernels/formats/bf16.inl"
#include "kernels/formats/fp32.inl"
#include "kernels/formats/fp8.inl"
#include "kernels/formats/int4.inl"
#include "kernels/formats/int8.inl"

namespace kt::kernels::KT_TABLE {
namespace {

template <class... Format>
struct FormatList {};
using AllFormats = FormatList<Bf16, Fp32, Int8, Int4, Fp8>;

}  // namespace
}  // namespace kt::kernels::KT_TABLE
