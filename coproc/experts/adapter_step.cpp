// The optimizer step, ‖S‖² and discard: elementwise work over the touched layers, cut into chunks of fixed size.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "coproc/experts/adapter_layer.h"

namespace kt::coproc {
namespace {

using Layer = Adapter::Layer;

// 64 Ki floats: P, S, m and v of a chunk are 1 MiB. Fixed, so that sums do not depend on the number of workers.
constexpr std::int64_t kChunkFloats = 65536;

struct Chunk {
  std::size_t tensor;  // Index of the caller's list.
  std::int64_t begin;
  std::int64_t count;
};

void add_chunks(std::size_t tensor, std::int64_t size, std::vector<Chunk>& chunks) {
  for (std::int64_t begin = 0; begin < size; begin += kChunkFloats) {
    chunks.push_back({tensor, begin, std::min(kChunkFloats, size - begin)});
  }
}

// Σ x² in double: eight running sums, then those in order.
double sum_of_squares(const float* x, std::int64_t count) {
  constexpr std::int64_t kLanes = 8;
  double sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      const double value = x[i + lane];
      sums[lane] += value * value;
    }
  }
  for (; i < count; ++i) sums[0] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

// torch.optim.adamw._single_tensor_adamw / adam: scalars in double, then rounded as torch's kernels round them.
kernels::AdamwArgs adamw_args(const shm::StepGroup& group, double scale, std::uint64_t t) {
  const auto steps = static_cast<double>(t);
  const bool decoupled = group.decoupled != 0;
  return {.grad_scale = static_cast<float>(scale),
          .decay = decoupled ? static_cast<float>(1 - group.lr * group.weight_decay) : 1.0f,
          .l2 = decoupled ? 0.0f : static_cast<float>(group.weight_decay),
          .one_minus_beta1 = static_cast<float>(1 - group.beta1),
          .beta2 = static_cast<float>(group.beta2),
          .one_minus_beta2 = static_cast<float>(1 - group.beta2),
          .step_size = static_cast<float>(group.lr / (1 - std::pow(group.beta1, steps))),
          .bias_correction2_sqrt = static_cast<float>(std::sqrt(1 - std::pow(group.beta2, steps))),
          .eps = static_cast<float>(group.eps)};
}

std::uint8_t group_of_tensor(std::span<const std::uint8_t> group_of, std::size_t wire, std::size_t tensor) {
  return group_of[wire * shm::kNumAdapterTensors + tensor];
}

// Tensors that exist, of touched layers, with what a step does to them.
struct StepTensor {
  Layer::Tensor* tensor;
  bool frozen;
  kernels::AdamwArgs args;
};

// Expert's packed copies to renew.
struct Repack {
  const Layer* layer;
  std::int64_t expert;
};

}  // namespace

double Adapter::squared_norm(std::span<const std::uint8_t> group_of, WorkerPool& pool) const {
  const State& s = *state_;
  KT_CHECK(group_of.size() == s.layers.size() * shm::kNumAdapterTensors);
  std::vector<const float*> sums;
  std::vector<Chunk> chunks;
  s.for_each_layer([&](std::size_t wire, const Layer& layer) {
    if (!layer.touched) return;
    for (std::size_t i = 0; i < layer.tensors.size(); ++i) {
      if (group_of_tensor(group_of, wire, i) == shm::kFrozen) continue;
      add_chunks(sums.size(), s.dims.num_experts * layer.tensors[i].expert_size(), chunks);
      sums.push_back(layer.tensors[i].s);
    }
  });
  std::vector<double> partial(chunks.size());
  pool.run(static_cast<std::int64_t>(chunks.size()), [&](std::int64_t task, int) {
    const Chunk& chunk = chunks[static_cast<std::size_t>(task)];
    partial[static_cast<std::size_t>(task)] = sum_of_squares(sums[chunk.tensor] + chunk.begin, chunk.count);
  });
  double total = 0;
  for (const double value : partial) total += value;
  return total;
}

void Adapter::discard(WorkerPool& pool) {
  State& s = *state_;
  std::vector<float*> sums;
  std::vector<Chunk> chunks;
  for (const auto& layer : s.layers) {
    if (layer == nullptr || !layer->touched) continue;  // I2: what was not touched is zero.
    layer->touched = false;
    for (const Layer::Tensor& tensor : layer->tensors) {
      add_chunks(sums.size(), s.dims.num_experts * tensor.expert_size(), chunks);
      sums.push_back(tensor.s);
    }
  }
  pool.run(static_cast<std::int64_t>(chunks.size()), [&](std::int64_t task, int) {
    const Chunk& chunk = chunks[static_cast<std::size_t>(task)];
    std::memset(sums[chunk.tensor] + chunk.begin, 0, static_cast<std::size_t>(chunk.count) * sizeof(float));
  });
}

void Adapter::step(const shm::StepHeader& header, std::span<const std::uint8_t> group_of, WorkerPool& pool) {
  State& s = *state_;
  KT_CHECK(group_of.size() == s.layers.size() * shm::kNumAdapterTensors);
  std::vector<StepTensor> tensors;
  std::vector<Chunk> chunks;
  std::vector<Repack> repacks;
  std::int64_t scratch_bytes = 0;
  for (std::size_t wire = 0; wire < s.layers.size(); ++wire) {
    Layer* layer = s.layers[wire].get();
    if (layer == nullptr || !layer->touched) continue;
    layer->touched = false;
    bool moves = false;
    for (std::size_t i = 0; i < layer->tensors.size(); ++i) {
      Layer::Tensor& tensor = layer->tensors[i];
      if (tensor.shape.rows == 0) continue;
      const std::uint8_t group = group_of_tensor(group_of, wire, i);
      StepTensor entry{&tensor, group == shm::kFrozen, {}};
      if (!entry.frozen) {
        KT_CHECK(group < header.num_groups && group < shm::kNumGroupsMax);
        entry.args = adamw_args(header.groups[group], header.scale, ++tensor.t);
        tensor.has_moments = true;
        moves = true;
      }
      add_chunks(tensors.size(), s.dims.num_experts * tensor.expert_size(), chunks);
      tensors.push_back(entry);
    }
    for (std::int64_t e = 0; moves && e < s.dims.num_experts; ++e) repacks.push_back({layer, e});
    scratch_bytes = std::max(scratch_bytes, layer->pack_scratch_bytes(s.table));
  }
  pool.run(static_cast<std::int64_t>(chunks.size()), [&](std::int64_t task, int) {
    const Chunk& chunk = chunks[static_cast<std::size_t>(task)];
    const StepTensor& entry = tensors[chunk.tensor];
    const Layer::Tensor& t = *entry.tensor;
    float* sums = t.s + chunk.begin;
    if (!entry.frozen) {
      s.table.adamw(t.p + chunk.begin, t.m + chunk.begin, t.v + chunk.begin, sums, chunk.count, entry.args);
    }
    std::memset(sums, 0, static_cast<std::size_t>(chunk.count) * sizeof(float));
  });
  s.pack_scratch.resize(std::max(s.pack_scratch.size(), static_cast<std::size_t>(pool.num_workers())));
  pool.run(static_cast<std::int64_t>(repacks.size()), [&](std::int64_t task, int worker) {
    const Repack& repack = repacks[static_cast<std::size_t>(task)];
    std::byte* scratch = s.pack_scratch[static_cast<std::size_t>(worker)].ensure(scratch_bytes);
    for (int part = 0; part < Layer::kNumParts; ++part) {
      repack.layer->pack(s.table, static_cast<Layer::Part>(part), repack.expert, scratch);
    }
  });
}

}  // namespace kt::coproc
