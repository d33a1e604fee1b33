// Where the parts of a request's payload lie: both ends compute the same offsets from the same numbers.
// Parts lie in the order of the structs below, each at a multiple of kPayloadAlignment. Offsets count from the payload.
#pragma once
#include <cstdint>

#include "shm/base/align.h"
#include "shm/protocol.h"
#include "shm/tensor_shape.h"

namespace kt::shm {

struct Part {
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

// Numbers a payload depends on; all fixed when the session opens. element_bytes: 2 (bf16), or 4 under
// --weight-format fp32. Limits keep every product below 2^63: hidden_size ≤ 2^20, top_k ≤ 2^10, num_tokens < 2^32.
struct PayloadShape {
  std::uint32_t hidden_size = 0;
  std::uint32_t top_k = 0;
  std::uint32_t element_bytes = 0;
};

namespace internal {
inline Part append(std::uint64_t& end, std::uint64_t bytes) {
  const Part part{end, bytes};
  end += round_up(bytes, kPayloadAlignment);
  return part;
}
}  // namespace internal

// x[T,H] element, ids i32[T,k], weights f32[T,k] in; y[T,H] element out.
struct ForwardPayload {
  Part x, ids, weights, y;
  std::uint64_t bytes = 0;

  ForwardPayload(const PayloadShape& shape, std::uint32_t num_tokens) {
    const std::uint64_t rows = std::uint64_t{num_tokens} * shape.hidden_size * shape.element_bytes;
    const std::uint64_t routes = std::uint64_t{num_tokens} * shape.top_k * 4;
    x = internal::append(bytes, rows);
    ids = internal::append(bytes, routes);
    weights = internal::append(bytes, routes);
    y = internal::append(bytes, rows);
  }
};

// dy[T,H] element in; dx[T,H] element, dw f32[T,k] out.
struct BackwardPayload {
  Part dy, dx, dw;
  std::uint64_t bytes = 0;

  BackwardPayload(const PayloadShape& shape, std::uint32_t num_tokens) {
    const std::uint64_t rows = std::uint64_t{num_tokens} * shape.hidden_size * shape.element_bytes;
    dy = internal::append(bytes, rows);
    dx = internal::append(bytes, rows);
    dw = internal::append(bytes, std::uint64_t{num_tokens} * shape.top_k * 4);
  }
};

// y[T,H] element out.
struct FetchPayload {
  Part y;
  std::uint64_t bytes = 0;

  FetchPayload(const PayloadShape& shape, std::uint32_t num_tokens) {
    y = internal::append(bytes, std::uint64_t{num_tokens} * shape.hidden_size * shape.element_bytes);
  }
};

// READ, WRITE: f32[num_experts, rows, cols] of one AdapterTensor. kind kT: f32[1], first_expert 0, num_experts 1.
struct TensorPayload {
  Part values;
  std::uint64_t bytes = 0;

  TensorPayload(TensorKind kind, std::uint64_t num_experts, const TensorShape& shape) {
    const std::uint64_t expert_floats = kind == TensorKind::kT ? 1 : static_cast<std::uint64_t>(shape.size());
    values = internal::append(bytes, num_experts * expert_floats * 4);
  }
};

// STEP: StepHeader, group_of u8[num_layers][6]. NORM has the same second part at offset 0 and no header: there
// any value but kFrozen counts the tensor into the norm.
struct StepPayload {
  Part header, group_of;
  std::uint64_t bytes = 0;

  explicit StepPayload(std::uint32_t num_layers) {
    header = internal::append(bytes, sizeof(StepHeader));
    group_of = internal::append(bytes, std::uint64_t{num_layers} * kNumAdapterTensors);
  }
};
struct NormPayload {
  Part group_of;
  std::uint64_t bytes = 0;

  explicit NormPayload(std::uint32_t num_layers) {
    group_of = internal::append(bytes, std::uint64_t{num_layers} * kNumAdapterTensors);
  }
};

}  // namespace kt::shm
