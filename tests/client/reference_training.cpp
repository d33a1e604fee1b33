#include "tests/client/reference_training.h"

#include <cmath>
#include <map>
#include <utility>

#include "tests/support/expert_reference.h"

namespace kt::client::testing {
namespace {

using kt::test::Doubles;
using kt::test::LoraTensors;
using kt::test::ReferenceBatch;
using kt::test::ReferenceLayer;

Doubles widen(const std::vector<float>& values) { return Doubles(values.begin(), values.end()); }
void append(Doubles& to, const std::vector<float>& values) { to.insert(to.end(), values.begin(), values.end()); }
void add(Doubles& to, const Doubles& values) {
  for (std::size_t i = 0; i < values.size(); ++i) to[i] += values[i];
}

class ReferenceTraining {
 public:
  ReferenceTraining(const Task& task, const kt::testing::WrittenCheckpoint& checkpoint)
      : task_(task), group_of_(task.group_of()), results_(task.world_size) {
    const AdapterSpec spec = task.adapter();
    for (std::size_t moe = 0; moe < task.sizes.moe_layers.size(); ++moe) {
      ReferenceLayer layer;
      layer.num_experts = task.sizes.num_experts;
      layer.top_k = task.sizes.top_k;
      layer.hidden = task.sizes.hidden_size;
      layer.intermediate = task.sizes.intermediate_size;
      for (std::uint32_t expert = 0; expert < task.sizes.num_experts; ++expert) {
        const auto& values = checkpoint.expert(static_cast<std::uint32_t>(moe), expert);
        append(layer.gate, values.gate);
        append(layer.up, values.up);
        append(layer.down, values.down);
      }
      layer.lora = {spec.gate_up.r, spec.gate_up.scaling, spec.shared_a, spec.down.r, spec.down.scaling, {}};
      for (std::size_t tensor = 0; tensor < kTensors.size(); ++tensor) {
        layer.lora.tensors[tensor] = widen(task.initial_values(task.sizes.moe_layers[moe], kTensors[tensor]));
      }
      layers_.push_back(std::move(layer));
    }
    moments_.resize(layers_.size());
  }

  std::vector<TrainingResult> train() {
    for (std::uint32_t step = 0; step < task_.num_steps; ++step) {
      zero_gradients();
      for (std::uint32_t micro = 0; micro < Task::kMicroBatches; ++micro) {
        for (std::uint32_t rank = 0; rank < task_.world_size; ++rank) run_micro_batch(step, micro, rank);
      }
      if (step == 0)
        each_tensor([&](std::size_t moe, std::size_t tensor, const std::string& key) {
          results_[0].first[key] = sums_[moe][tensor];
        });
      take_step(step);
    }
    for (TrainingResult& result : results_) {
      each_tensor([&](std::size_t moe, std::size_t tensor, const std::string& key) {
        result.params[key] = layers_[moe].lora.tensors[tensor];
      });
    }
    return std::move(results_);
  }

 private:
  template <class Visit>
  void each_tensor(const Visit& visit) const {
    for (std::size_t moe = 0; moe < layers_.size(); ++moe) {
      for (std::size_t tensor = 0; tensor < kTensors.size(); ++tensor) {
        if (task_.tensor_shape(kTensors[tensor])[0] == 0) continue;
        visit(moe, tensor, tensor_key(task_.sizes.moe_layers[moe], kTensors[tensor]));
      }
    }
  }
  std::uint8_t group(std::size_t moe, std::size_t tensor) const {
    return group_of_[task_.sizes.moe_layers[moe] * std::size_t{shm::kNumAdapterTensors} + tensor];
  }

  void zero_gradients() {
    sums_.assign(layers_.size(), {});
    each_tensor([&](std::size_t moe, std::size_t tensor, const std::string&) {
      sums_[moe][tensor].assign(layers_[moe].lora.tensors[tensor].size(), 0);
    });
  }

  void run_micro_batch(std::uint32_t step, std::uint32_t micro, std::uint32_t rank) {
    const MicroBatch data(task_, step, micro, rank);
    std::vector<ReferenceBatch> batches;
    Doubles h = widen(data.x);
    for (std::size_t moe = 0; moe < layers_.size(); ++moe) {
      batches.push_back({data.num_tokens, h, data.ids[moe], data.weights[moe]});
      add(h, kt::test::reference_forward(layers_[moe], batches.back()));
    }
    double loss = 0;
    const double share = data.num_tokens == 0 ? 0 : 1.0 / (data.num_tokens * Task::kMicroBatches);
    for (std::size_t i = 0; i < h.size(); ++i) {
      h[i] -= static_cast<double>(data.target[i]);
      loss += h[i] * h[i] * share / 2;
      h[i] *= share;  // Now the gradient.
    }
    TrainingResult& result = results_[rank];
    result.losses.push_back(loss);
    const bool is_first = step == 0 && micro == 0;
    for (std::size_t moe = layers_.size(); moe-- > 0;) {
      const auto gradients = kt::test::reference_backward(layers_[moe], batches[moe], h);
      add(h, gradients.dx);
      for (std::size_t tensor = 0; tensor < kTensors.size(); ++tensor) {
        add(sums_[moe][tensor], gradients.lora[tensor]);
      }
      if (is_first) result.first["dw." + std::to_string(task_.sizes.moe_layers[moe])] = gradients.dw;
    }
    if (is_first) result.first["dx"] = h;
  }

  void take_step(std::uint32_t step) {
    double squares = 0;
    each_tensor([&](std::size_t moe, std::size_t tensor, const std::string&) {
      if (group(moe, tensor) == shm::kFrozen) return;
      for (const double value : sums_[moe][tensor]) squares += value * value;
    });
    const double norm = std::sqrt(squares) / task_.world_size;
    for (TrainingResult& result : results_) result.norms.push_back(norm);
    const double scale = task_.scale(norm);
    const auto groups = task_.groups(step);
    each_tensor([&](std::size_t moe, std::size_t tensor, const std::string&) {
      if (group(moe, tensor) == shm::kFrozen) return;
      const shm::StepGroup& hyper = groups[group(moe, tensor)];
      Doubles gradient = sums_[moe][tensor];
      for (double& value : gradient) value *= scale;
      kt::test::reference_step(
          {hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, hyper.decoupled != 0}, gradient,
          layers_[moe].lora.tensors[tensor], moments_[moe][tensor]);
    });
  }

  const Task& task_;
  const std::vector<std::uint8_t> group_of_;
  std::vector<ReferenceLayer> layers_;  // Per MoE layer.
  std::vector<LoraTensors> sums_;       // S.
  std::vector<std::array<kt::test::ReferenceMoments, kt::test::kNumLoraTensors>> moments_;
  std::vector<TrainingResult> results_;  // Per rank.
};

}  // namespace

std::vector<TrainingResult> train_in_double(const Task& task, const kt::testing::WrittenCheckpoint& checkpoint) {
  return ReferenceTraining(task, checkpoint).train();
}

}  // namespace kt::client::testing
