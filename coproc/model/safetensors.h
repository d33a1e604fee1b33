// The header of a safetensors file, fully validated: nothing behind this file has to distrust an offset again.
//
//   byte 0       u64, little-endian: n, the size of the header
//   byte 8       n bytes of JSON, the first one '{', blanks allowed at the end:
//                {"__metadata__": {"key": "value", …},
//                 "name": {"dtype": "BF16", "shape": [4, 6], "data_offsets": [0, 48]}, …}
//   byte 8 + n   the data; data_offsets [begin, end) count from here. The tensors cover it without gap or overlap, row
//                after row, little-endian.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "coproc/model/input_file.h"
#include "shm/base/result.h"

namespace kt::coproc {

// Element types of the format (safetensors 0.8). The co-process computes with BF16, F16 and F32; the others have to be
// known because non-expert tensors may have them.
enum class DType : std::uint8_t {
  kBool,
  kF4,
  kF6E2M3,
  kF6E3M2,
  kU8,
  kI8,
  kF8E5M2,
  kF8E4M3,
  kF8E8M0,
  kF8E4M3Fnuz,
  kF8E5M2Fnuz,
  kI16,
  kU16,
  kF16,
  kBf16,
  kI32,
  kU32,
  kF32,
  kC64,
  kF64,
  kI64,
  kU64,
};
// As spelled in the file: "BF16".
std::string_view dtype_name(DType dtype);
std::uint32_t dtype_bits(DType dtype);

struct TensorInfo {
  std::string name;
  DType dtype = DType::kBf16;
  std::vector<std::uint64_t> shape;
  std::uint64_t offset = 0;  // Of the first byte, from the start of the file.
  std::uint64_t bytes = 0;   // Shape × size of dtype; offset + bytes ≤ size of the file.
};

// "[4,6]"
std::string shape_text(const std::vector<std::uint64_t>& shape);

// Larger headers are refused, as by the safetensors library.
inline constexpr std::uint64_t kHeaderBytesMax = 100'000'000;

// The tensors of a file, in the order of their offsets. Everything that is not exactly as drawn above, also duplicate
// names, unknown dtypes and a file that is longer or shorter than its tensors, is kBadModel naming file, tensor and
// numbers.
Result<std::vector<TensorInfo>> read_safetensors_header(const InputFile& file);

// The same for a header already in memory: `json` are the n bytes, `path` is for messages.
Result<std::vector<TensorInfo>> parse_safetensors_header(std::string_view json, std::uint64_t file_bytes,
                                                         const std::string& path);

}  // namespace kt::coproc
