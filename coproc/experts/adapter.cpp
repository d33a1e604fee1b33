#include "coproc/experts/adapter.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "coproc/experts/adapter_layer.h"
#include "coproc/machine/memory_room.h"

namespace kt::coproc {
namespace {

using kernels::kPanelRows;
using shm::AdapterTensor;
using shm::TensorKind;

constexpr std::uint32_t kRankMax = 256;
constexpr std::uint64_t kPartAlignment = 128;
constexpr const char* kMemoryFix = "choose a smaller r, adapt fewer layers, or stop other processes on this machine";

std::int64_t pad(std::int64_t n) {
  return static_cast<std::int64_t>(round_up(static_cast<std::uint64_t>(n), std::uint64_t{kPanelRows}));
}

Status check_half(const char* name, const shm::HalfSpec& half) {
  if (half.r <= kRankMax && std::isfinite(half.scaling)) return ok_status();
  return Error{ErrorCode::kInvalidArgument, std::string("cannot create the adapter's ") + name + " half",
               "r = " + std::to_string(half.r) + ", scaling = " + std::to_string(half.scaling) +
                   "; r must be 0 (not adapted) to " + std::to_string(kRankMax) + ", scaling finite",
               "choose another r and lora_alpha in LoraConfig"};
}

Status check_spec(const AdapterLayerSpec& spec) {
  KT_TRY_STATUS(check_half("gate_up", spec.gate_up));
  KT_TRY_STATUS(check_half("down", spec.down));
  if (spec.gate_up.r > 0 || spec.down.r > 0) return ok_status();
  return Error{ErrorCode::kInvalidArgument, "cannot create an adapter that adapts nothing",
               "r = 0 for gate_up and for down",
               "give at least one of them a rank of 1 to " + std::to_string(kRankMax)};
}

Error layer_error(std::uint32_t layer, const std::string& why) {
  return Error{ErrorCode::kInvalidArgument, "cannot adapt the experts of layer " + std::to_string(layer), why,
               "name each layer with routed experts at most once"};
}

void set_shapes(Adapter::Layer& layer, const ExpertDims& dims) {
  const shm::LoraSizes sizes{dims.hidden_size, dims.intermediate_size, layer.spec.gate_up.r, layer.spec.shared_a,
                             layer.spec.down.r};
  for (std::size_t i = 0; i < layer.tensors.size(); ++i) {
    layer.tensors[i].shape = shm::tensor_shape(sizes, static_cast<AdapterTensor>(i));
  }
  if (const std::int64_t r = layer.spec.gate_up.r; r > 0) {
    const std::int64_t rank = pad(layer.spec.shared_a ? r : 2 * r);
    layer.parts[Adapter::Layer::kGateUpA] = {nullptr, 0, rank / kPanelRows, dims.hidden_padded()};
    layer.parts[Adapter::Layer::kGateUpB] = {nullptr, 0, 2 * dims.intermediate_padded() / kPanelRows, rank};
  }
  if (const std::int64_t r = layer.spec.down.r; r > 0) {
    layer.parts[Adapter::Layer::kDownA] = {nullptr, 0, pad(r) / kPanelRows, dims.intermediate_padded()};
    layer.parts[Adapter::Layer::kDownB] = {nullptr, 0, dims.hidden_padded() / kPanelRows, pad(r)};
  }
}

// Gives everything its place in the layer's memory, or, without memory yet, only adds up. Returns the bytes.
std::uint64_t lay_out(Adapter::Layer& layer, std::int64_t num_experts, std::int64_t element_bytes) {
  std::uint64_t used = 0;
  const auto place = [&](std::int64_t bytes) {
    std::byte* at = layer.memory.data() == nullptr ? nullptr : layer.memory.data() + used;
    used += round_up(static_cast<std::uint64_t>(bytes), kPartAlignment);
    return at;
  };
  for (Adapter::Layer::Packed& part : layer.parts) {
    part.stride = kernels::panel_stride_bytes(part.k, element_bytes);
    part.data = place(num_experts * part.num_panels * part.stride);
  }
  layer.packed_bytes = used;
  // All P, then all S, then m and v: what is not trained takes no pages.
  for (float* Adapter::Layer::Tensor::*member : {&Adapter::Layer::Tensor::p, &Adapter::Layer::Tensor::s,
                                                 &Adapter::Layer::Tensor::m, &Adapter::Layer::Tensor::v}) {
    for (Adapter::Layer::Tensor& tensor : layer.tensors) {
      const std::int64_t bytes = num_experts * tensor.expert_size() * static_cast<std::int64_t>(sizeof(float));
      tensor.*member = static_cast<float*>(static_cast<void*>(place(bytes)));
    }
  }
  return used;
}

// The array of a kind that is one, nullptr for kT.
float* array_of(const Adapter::Layer::Tensor& tensor, TensorKind kind) {
  switch (kind) {
    case TensorKind::kParam:
      return tensor.p;
    case TensorKind::kGrad:
      return tensor.s;
    case TensorKind::kExpAvg:
      return tensor.m;
    case TensorKind::kExpAvgSq:
      return tensor.v;
    case TensorKind::kT:
      break;
  }
  return nullptr;
}

// torch keeps the number of steps as f32; anything that is not a count becomes the nearest one.
std::uint64_t steps_from(float value) {
  constexpr float kStepsMax = 9007199254740992.0f;  // 2^53: exact in double, where the bias corrections are computed.
  return value > 0 ? static_cast<std::uint64_t>(std::min(value, kStepsMax)) : 0;
}

std::uint64_t floats_of(const Adapter::Layer& layer, std::int64_t num_experts, bool only_with_moments) {
  std::int64_t count = 0;
  for (const Adapter::Layer::Tensor& tensor : layer.tensors) {
    if (!only_with_moments || tensor.has_moments) count += num_experts * tensor.expert_size();
  }
  return static_cast<std::uint64_t>(count);
}

}  // namespace

Result<std::unique_ptr<Adapter::Layer>> Adapter::State::make_layer(const AdapterLayerSpec& spec,
                                                                   std::size_t num_layers) const {
  auto layer = std::make_unique<Layer>();
  layer->spec = spec;
  set_shapes(*layer, dims);
  const std::uint64_t bytes = lay_out(*layer, dims.num_experts, table.element_bytes);
  KT_TRY_STATUS(require_memory(
      read_memory_room(read_cgroup_limits()), bytes * num_layers,
      "the adapter, its gradients and optimizer state in " + std::to_string(num_layers) + " layers", kMemoryFix));
  KT_TRY(layer->memory, Memory::map(bytes, "one layer of the adapter", kMemoryFix));
  lay_out(*layer, dims.num_experts, table.element_bytes);
  return layer;
}

Adapter::Adapter(const ExpertDims& dims, const kernels::KernelTable& table)
    : state_(std::make_unique<State>(dims, table)) {}
Adapter::~Adapter() = default;

Status Adapter::add_layers(std::span<const std::uint32_t> layers, const AdapterLayerSpec& spec) {
  State& s = *state_;
  KT_TRY_STATUS(check_spec(spec));
  std::vector<bool> named(s.layers.size());
  for (const std::uint32_t wire : layers) {
    if (wire >= s.layers.size() || s.dims.moe_index(wire) < 0) return layer_error(wire, "it has no routed experts");
    if (s.layers[wire] != nullptr || named[wire]) return layer_error(wire, "it is adapted already");
    named[wire] = true;
  }
  std::vector<std::unique_ptr<Layer>> made;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    KT_TRY(auto layer, s.make_layer(spec, layers.size() - i));
    made.push_back(std::move(layer));
  }
  for (std::size_t i = 0; i < layers.size(); ++i) s.layers[layers[i]] = std::move(made[i]);
  return ok_status();
}

const Adapter::Layer* Adapter::layer(std::uint32_t layer) const {
  return layer < state_->layers.size() ? state_->layers[layer].get() : nullptr;
}
Adapter::Layer* Adapter::layer(std::uint32_t layer) {
  return layer < state_->layers.size() ? state_->layers[layer].get() : nullptr;
}

const AdapterLayerSpec* Adapter::spec(std::uint32_t wire) const {
  const Layer* found = layer(wire);
  return found == nullptr ? nullptr : &found->spec;
}

bool Adapter::same_specs(const Adapter& other) const {
  const auto same = [](const auto& a, const auto& b) {
    return a == nullptr || b == nullptr ? a == b : a->spec == b->spec;
  };
  return std::equal(state_->layers.begin(), state_->layers.end(), other.state_->layers.begin(),
                    other.state_->layers.end(), same);
}

std::optional<shm::TensorShape> Adapter::shape(std::uint32_t wire, AdapterTensor tensor) const {
  const Layer* found = layer(wire);
  if (found == nullptr || static_cast<std::size_t>(tensor) >= found->tensors.size()) return std::nullopt;
  const shm::TensorShape shape = found->tensor(tensor).shape;
  return shape.rows > 0 ? std::optional(shape) : std::nullopt;
}

void Adapter::read(TensorKind kind, std::uint32_t wire, AdapterTensor which, std::uint32_t first_expert,
                   std::uint32_t num_experts, float* values) const {
  const Layer::Tensor& tensor = layer(wire)->tensor(which);
  if (kind == TensorKind::kT) {
    values[0] = static_cast<float>(tensor.t);
    return;
  }
  const auto size = static_cast<std::size_t>(tensor.expert_size());
  std::memcpy(values, array_of(tensor, kind) + first_expert * size, num_experts * size * sizeof(float));
}

void Adapter::write(TensorKind kind, std::uint32_t wire, AdapterTensor which, std::uint32_t first_expert,
                    std::uint32_t num_experts, const float* values) {
  State& s = *state_;
  Layer& to = *layer(wire);
  Layer::Tensor& tensor = to.tensor(which);
  if (kind == TensorKind::kT) {
    tensor.t = steps_from(values[0]);
    return;
  }
  const auto size = static_cast<std::size_t>(tensor.expert_size());
  std::memcpy(array_of(tensor, kind) + first_expert * size, values, num_experts * size * sizeof(float));
  if (kind == TensorKind::kGrad) to.touched = true;
  if (kind == TensorKind::kExpAvg || kind == TensorKind::kExpAvgSq) tensor.has_moments = true;
  if (kind != TensorKind::kParam) return;
  if (s.pack_scratch.empty()) s.pack_scratch.resize(1);
  std::byte* scratch = s.pack_scratch[0].ensure(to.pack_scratch_bytes(s.table));
  for (std::uint32_t i = 0; i < num_experts; ++i) {
    to.pack(s.table, Layer::part_of(which), first_expert + i, scratch);
  }
}

bool Adapter::has_gradients() const {
  return std::any_of(state_->layers.begin(), state_->layers.end(),
                     [](const auto& layer) { return layer != nullptr && layer->touched; });
}

std::uint64_t Adapter::parameter_bytes() const {
  std::uint64_t bytes = 0;
  state_->for_each_layer([&](std::size_t, const Layer& layer) {
    bytes += layer.packed_bytes + floats_of(layer, state_->dims.num_experts, false) * sizeof(float);
  });
  return bytes;
}

std::uint64_t Adapter::gradient_bytes() const {
  std::uint64_t bytes = 0;
  state_->for_each_layer([&](std::size_t, const Layer& layer) {
    bytes += floats_of(layer, state_->dims.num_experts, false) * sizeof(float);
  });
  return bytes;
}

std::uint64_t Adapter::optimizer_bytes() const {
  std::uint64_t bytes = 0;
  state_->for_each_layer([&](std::size_t, const Layer& layer) {
    bytes += 2 * floats_of(layer, state_->dims.num_experts, true) * sizeof(float);
  });
  return bytes;
}

}  // namespace kt::coproc
