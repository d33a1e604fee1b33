// Conversion of checkpoint elements to the element types the kernels compute with.
#pragma once
#include <cstdint>

#include "coproc/model/safetensors.h"

namespace kt::coproc {

// What the daemon computes with: bf16 bits in std::uint16_t, or float for --weight-format fp32.
enum class ElementType : std::uint8_t { kBf16, kFp32 };
constexpr std::uint32_t element_bytes(ElementType element) { return element == ElementType::kBf16 ? 2 : 4; }

// bf16 elements are used as they lie in a BF16 file, fp32 elements as they lie in an F32 file.
bool needs_conversion(DType from, ElementType to);

// n elements, from kBf16, kF16 or kF32. To fp32 every conversion is exact; to bf16 it rounds to nearest, ties to even,
// keeps denormals and infinities, and makes every NaN a quiet NaN of the same sign. No overlap of from and out.
void convert_elements(DType from_type, const void* from, ElementType to_type, void* out, std::uint64_t n);

}  // namespace kt::coproc
