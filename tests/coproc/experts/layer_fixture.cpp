#include "tests/coproc/experts/layer_fixture.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "tests/support/formats/format_reference.h"

namespace kt::test {
namespace {

Doubles random_elements(std::size_t count, double deviation, std::int64_t element_bytes, std::mt19937& random) {
  std::normal_distribution<double> normal(0, deviation);
  Doubles values(count);
  for (double& value : values) value = to_element(normal(random), element_bytes);
  return values;
}

std::size_t product(std::initializer_list<std::int64_t> factors) {
  std::int64_t count = 1;
  for (const std::int64_t factor : factors) count *= factor;
  return static_cast<std::size_t>(count);
}

// What quantised weights [num_experts, n, k] are computed with.
Doubles dequantised(const Doubles& weights, std::int64_t num_experts, std::int64_t k,
                    const kernels::StorageFormat& format) {
  const auto expert_size = static_cast<std::ptrdiff_t>(weights.size()) / num_experts;
  Doubles result;
  for (auto at = weights.begin(); at != weights.end(); at += expert_size) {
    const QuantReference reference =
        format_reference(format.name)
            .quantise(std::vector<float>(at, at + expert_size), expert_size / k, k, format.quantised->group);
    result.insert(result.end(), reference.weights.begin(), reference.weights.end());
  }
  return result;
}

// The top_k largest of random logits with their softmax, as routers do.
void route_token(std::int64_t num_experts, std::int64_t top_k, std::int32_t* ids, float* weights,
                 std::mt19937& random) {
  std::normal_distribution<double> normal;
  Doubles logits(static_cast<std::size_t>(num_experts));
  for (double& logit : logits) logit = normal(random);
  std::vector<std::int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
  });
  double sum = 0;
  for (const double logit : logits) sum += std::exp(logit);
  for (std::int64_t j = 0; j < top_k; ++j) {
    ids[j] = order[static_cast<std::size_t>(j)];
    weights[j] = static_cast<float>(std::exp(logits[static_cast<std::size_t>(ids[j])]) / sum);
  }
}

}  // namespace

double to_element(double value, std::int64_t element_bytes) {
  auto as_float = static_cast<float>(value);
  if (element_bytes == 4) return static_cast<double>(as_float);
  std::uint32_t bits = 0;
  std::memcpy(&bits, &as_float, sizeof bits);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  std::memcpy(&as_float, &bits, sizeof bits);
  return static_cast<double>(as_float);
}

Bytes to_elements(const Doubles& values, std::int64_t element_bytes) {
  Bytes out(values.size() * static_cast<std::size_t>(element_bytes));
  for (std::size_t n = 0; n < values.size(); ++n) {
    const auto value = static_cast<float>(to_element(values[n], element_bytes));
    std::byte bytes[4];
    std::memcpy(bytes, &value, sizeof bytes);
    // Little-endian: bf16 is the upper half.
    std::memcpy(out.data() + n * static_cast<std::size_t>(element_bytes), bytes + (4 - element_bytes),
                static_cast<std::size_t>(element_bytes));
  }
  return out;
}

Doubles from_elements(const std::byte* elements, std::size_t count, std::int64_t element_bytes) {
  Doubles out(count);
  for (std::size_t n = 0; n < count; ++n) {
    std::byte bytes[4] = {};
    std::memcpy(bytes + (4 - element_bytes), elements + n * static_cast<std::size_t>(element_bytes),
                static_cast<std::size_t>(element_bytes));
    float value = 0;
    std::memcpy(&value, bytes, sizeof value);
    out[n] = static_cast<double>(value);
  }
  return out;
}

std::string why_not_runnable(const kernels::KernelTable& table) {
  std::string why;
  if (kernels::find_table(table.name, table.element_bytes, &why) == &table) return "";
  return "table " + std::string(table.name) + " does not run here: " + why;
}

bool Guarded::intact() const {
  const auto is_poison = [](std::byte b) { return b == kPoison; };
  return std::all_of(bytes_.begin(), bytes_.begin() + kGuard, is_poison) &&
         std::all_of(bytes_.end() - kGuard, bytes_.end(), is_poison);
}

TestLayer::TestLayer(const LayerOptions& options, const kernels::KernelTable& table, std::uint32_t seed)
    : table_(table) {
  dims_ = {.num_layers = 3,
           .moe_layers = {kWireLayer},
           .num_experts = static_cast<std::uint32_t>(options.num_experts),
           .top_k = static_cast<std::uint32_t>(options.top_k),
           .hidden_size = static_cast<std::uint32_t>(options.hidden),
           .intermediate_size = static_cast<std::uint32_t>(options.intermediate),
           .element_bytes = static_cast<std::uint32_t>(table.element_bytes),
           .activation = options.activation};
  reference_.num_experts = options.num_experts;
  reference_.top_k = options.top_k;
  reference_.hidden = options.hidden;
  reference_.intermediate = options.intermediate;
  reference_.limit = options.activation.limit;
  std::mt19937 random(seed);
  fill_weights(options, random);
  if (options.spec.gate_up.r > 0 || options.spec.down.r > 0) make_adapter(options.spec, random);
}

void TestLayer::fill_weights(const LayerOptions& options, std::mt19937& random) {
  ReferenceLayer& r = reference_;
  const std::size_t count = product({r.num_experts, r.intermediate, r.hidden});
  r.gate = random_elements(count, 1 / std::sqrt(static_cast<double>(r.hidden)), table_.element_bytes, random);
  r.up = random_elements(count, 1 / std::sqrt(static_cast<double>(r.hidden)), table_.element_bytes, random);
  r.down = random_elements(count, 1 / std::sqrt(static_cast<double>(r.intermediate)), table_.element_bytes, random);
  auto created = coproc::ExpertWeights::create(dims_, table_, options.format);
  weights_ = std::move(created).value();
  const Bytes gate = to_elements(r.gate, table_.element_bytes);
  const Bytes up = to_elements(r.up, table_.element_bytes);
  const Bytes down = to_elements(r.down, table_.element_bytes);
  const std::size_t expert_bytes = gate.size() / static_cast<std::size_t>(r.num_experts);
  for (std::uint32_t e = 0; e < dims_.num_experts; ++e) {
    const std::size_t at = e * expert_bytes;
    weights_->set_expert(0, e, gate.data() + at, up.data() + at, down.data() + at);
  }
  if (options.format == nullptr || options.original_reference) return;
  r.gate = dequantised(r.gate, r.num_experts, r.hidden, *options.format);
  r.up = dequantised(r.up, r.num_experts, r.hidden, *options.format);
  r.down = dequantised(r.down, r.num_experts, r.intermediate, *options.format);
}

void TestLayer::make_adapter(const coproc::AdapterLayerSpec& spec, std::mt19937& random) {
  ReferenceLora& lora = reference_.lora;
  lora.gate_up_r = spec.gate_up.r;
  lora.gate_up_scaling = spec.gate_up.scaling;
  lora.shared_a = spec.shared_a;
  lora.down_r = spec.down.r;
  lora.down_scaling = spec.down.scaling;
  adapter_ = std::make_unique<coproc::Adapter>(dims_, table_);
  const std::uint32_t layers[] = {kWireLayer};
  ASSERT_TRUE(adapter_->add_layers(layers, spec).ok());
  for (std::size_t tensor = 0; tensor < kNumLoraTensors; ++tensor) {
    const std::int64_t rows = reference_.lora_rows(tensor);
    const std::int64_t cols = reference_.lora_cols(tensor);
    if (rows == 0) continue;
    // s·B·A is half as strong as W: rather more than training makes of it.
    const bool is_b = tensor % 2 == 1;
    const double scaling = tensor < 4 ? lora.gate_up_scaling : lora.down_scaling;
    const double deviation = (is_b ? 0.5 / scaling : 1) / std::sqrt(static_cast<double>(cols));
    lora.tensors[tensor] =
        random_elements(product({reference_.num_experts, rows, cols}), deviation, table_.element_bytes, random);
    const std::vector<float> values(lora.tensors[tensor].begin(), lora.tensors[tensor].end());
    adapter_->write(shm::TensorKind::kParam, kWireLayer, static_cast<shm::AdapterTensor>(tensor), 0, dims_.num_experts,
                    values.data());
  }
}

Batch TestLayer::make_batch(std::int64_t num_tokens, Routing routing, std::mt19937& random) const {
  const std::int64_t top_k = reference_.top_k;
  const auto sentinel = static_cast<std::int32_t>(reference_.num_experts);
  Batch batch;
  batch.reference.num_tokens = num_tokens;
  batch.reference.x = random_elements(product({num_tokens, reference_.hidden}), 1, table_.element_bytes, random);
  batch.dy = random_elements(product({num_tokens, reference_.hidden}), 1, table_.element_bytes, random);
  batch.x_elements = to_elements(batch.reference.x, table_.element_bytes);
  batch.dy_elements = to_elements(batch.dy, table_.element_bytes);
  batch.reference.ids.resize(product({num_tokens, top_k}));
  batch.reference.weights.resize(product({num_tokens, top_k}));
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    std::int32_t* ids = batch.reference.ids.data() + t * top_k;
    route_token(reference_.num_experts, top_k, ids, batch.reference.weights.data() + t * top_k, random);
    for (std::int64_t j = 0; j < top_k; ++j) {
      if (routing == Routing::kOneExpert) ids[j] = j == 0 ? sentinel / 2 : sentinel;
      if (routing == Routing::kSameExpertTwice && j == 1) ids[1] = ids[0];
      if (routing == Routing::kWithSentinels && (t + j) % 3 == 0) ids[j] = sentinel;
      if (routing == Routing::kOnlySentinels) ids[j] = sentinel;
    }
  }
  return batch;
}

std::vector<ItemResult> TestLayer::run(const std::vector<const Batch*>& batches, const RunOptions& options) {
  std::vector<std::vector<int>> cpus;
  for (const int count : options.workers_of_nodes) cpus.emplace_back(static_cast<std::size_t>(count), -1);
  if (cpus.empty()) cpus.emplace_back(static_cast<std::size_t>(options.num_workers), -1);
  coproc::WorkerPool pool(cpus);
  kernels::KernelTable table = table_;
  if (options.l2_bytes > 0) table.l2_bytes = options.l2_bytes;
  coproc::ExpertCompute compute(dims_, table, *weights_, pool);
  const auto gate_up_row = static_cast<std::size_t>(2 * dims_.intermediate_padded() * table_.element_bytes);
  std::vector<coproc::SavedActivation> activations(batches.size());
  std::vector<coproc::ForwardItem> forward;
  std::vector<coproc::BackwardItem> backward;
  std::vector<Guarded> y;
  std::vector<Guarded> gate_up;
  std::vector<Guarded> dx;
  std::vector<Guarded> dw;
  for (const Batch* batch : batches) {
    const std::size_t slots = batch->reference.ids.size();
    y.emplace_back(batch->x_elements.size());
    gate_up.emplace_back(options.keep_gate_up ? slots * gate_up_row : 0);
    dx.emplace_back(batch->x_elements.size());
    dw.emplace_back(slots * sizeof(float));
  }
  for (std::size_t n = 0; n < batches.size(); ++n) {
    const ReferenceBatch& batch = batches[n]->reference;
    forward.push_back({batches[n]->x_elements.data(), batch.ids.data(), batch.weights.data(),
                       static_cast<std::uint32_t>(batch.num_tokens), y[n].data(),
                       options.keep_gate_up ? gate_up[n].data() : nullptr});
  }
  compute.forward(kWireLayer, adapter_.get(), forward);
  forward_traffic_ = compute.traffic();
  for (std::size_t n = 0; n < batches.size(); ++n) {
    coproc::SavedActivation& act = activations[n];
    act.layer = kWireLayer;
    act.num_tokens = forward[n].num_tokens;
    act.x = batches[n]->x_elements;
    act.ids = batches[n]->reference.ids;
    act.weights = batches[n]->reference.weights;
    act.gate_up = gate_up[n].contents();
    backward.push_back({batches[n]->dy_elements.data(), &act, dx[n].data(), dw[n].floats()});
  }
  compute.backward(kWireLayer, adapter_.get(), backward, options.accumulate);
  backward_traffic_ = compute.traffic();
  std::vector<ItemResult> results;
  for (std::size_t n = 0; n < batches.size(); ++n) {
    EXPECT_TRUE(y[n].intact() && gate_up[n].intact() && dx[n].intact() && dw[n].intact()) << "item " << n;
    results.push_back({y[n].contents(), gate_up[n].contents(), dx[n].contents(), dw[n].contents()});
  }
  return results;
}

std::vector<float> TestLayer::gradient(std::size_t tensor) const {
  const std::int64_t rows = reference_.lora_rows(tensor);
  std::vector<float> values(product({reference_.num_experts, rows, reference_.lora_cols(tensor)}));
  if (rows > 0) {
    adapter_->read(shm::TensorKind::kGrad, kWireLayer, static_cast<shm::AdapterTensor>(tensor), 0, dims_.num_experts,
                   values.data());
  }
  return values;
}

std::vector<std::vector<float>> TestLayer::gradients() const {
  std::vector<std::vector<float>> all;
  for (std::size_t tensor = 0; tensor < kNumLoraTensors; ++tensor) all.push_back(gradient(tensor));
  return all;
}

void TestLayer::discard() {
  coproc::WorkerPool pool(std::vector<int>{-1});
  adapter_->discard(pool);
}

std::string table_name(const testing::TestParamInfo<const kernels::KernelTable*>& info) {
  return std::string(info.param->name) + (info.param->element_bytes == 4 ? "_fp32" : "_bf16");
}

coproc::AdapterLayerSpec spec_of(std::uint32_t gate_up_r, bool shared_a, std::uint32_t down_r) {
  return {
      .gate_up = {gate_up_r, gate_up_r > 0 ? 2.0 : 0}, .shared_a = shared_a, .down = {down_r, down_r > 0 ? 0.5 : 0}};
}

}  // namespace kt::test
