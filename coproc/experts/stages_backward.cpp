#include "coproc/experts/stages_backward.h"

#include "coproc/experts/products.h"
#include "coproc/experts/schedule.h"
#include "coproc/experts/stages_forward.h"

namespace kt::coproc {
namespace {

using kernels::Fetch;
using kernels::kPanelRows;
using shm::AdapterTensor;

bool keeps_z(const Pass& pass) { return pass.accumulate_to != nullptr && pass.adapts_down(); }

void gather_dy(const Pass& pass, Block& block, Range rows, Worker& worker, const Fetch& /*next*/) {
  gather(pass, block, kDy, rows, [&](std::size_t item) { return pass.backward_items[item].dy; });
  project(pass, LoraLayer::kDownB, block, rows, worker);
}

// Through the activation, for a group's columns of P: dG and dU, the parts of dw, and z where ∂/∂down_a needs it. Kept
// G and U lie by route in their activations.
void differentiate_rows(const Pass& pass, Block& block, Range rows, Range panels, const float* p) {
  const std::int64_t columns = panels.count() * kPanelRows;
  const std::int64_t column = panels.begin * kPanelRows;
  const auto differentiate_run = [&](const void* saved, std::int64_t ld_saved, const std::int32_t* saved_row,
                                     std::int64_t row, std::int64_t count) {
    const Rows gate_up = rows_of(pass, block, kGateUp, row);
    const Rows z = keeps_z(pass) ? rows_of(pass, block, kZ, row) : Rows{};
    pass.table.activate_backward({.activation = pass.activation,
                                  .m = count,
                                  .n = columns,
                                  .saved = static_cast<const std::byte*>(saved) + 2 * column * pass.element_bytes,
                                  .ld_saved = ld_saved,
                                  .saved_row = saved_row,
                                  .p = p + (row - rows.begin) * columns,
                                  .ld_p = columns,
                                  .weight = pass.routes.weight.data() + block.begin + row,
                                  .grad_weight = block[kDw].floats() + panels.begin * block.num_rows() + row,
                                  .ld_grad_weight = block.num_rows(),
                                  .z = z.data == nullptr ? nullptr : z.data + column * pass.element_bytes,
                                  .ld_z = z.ld,
                                  .grad_gate_up = gate_up.data + 2 * column * pass.element_bytes,
                                  .ld_grad = gate_up.ld});
  };
  if (pass.recompute) {
    const Rows saved = rows_of(pass, block, kGateUp, rows.begin);
    return differentiate_run(saved.data, saved.ld, nullptr, rows.begin, rows.count());
  }
  for_each_run(pass.routes, block.begin + rows.begin, block.begin + rows.end,
               [&](std::size_t item, std::int64_t first, std::int64_t stop) {
                 differentiate_run(pass.backward_items[item].act->gate_up.data(), 2 * pass.intermediate_padded,
                                   pass.routes.route.data() + first, first - block.begin, stop - first);
               });
}

// P = dY·Wd + (s·yb)·Ad, and through the activation.
void differentiate(const Pass& pass, Block& block, Range panels, Worker& worker, const Fetch& next) {
  const Product product = {pass.down_w(block.expert), lora_matrix(pass, LoraLayer::kDownA, block.expert), true};
  multiply_block(pass, product, kDy, block, panels, worker, next,
                 [&](Range rows, Range group, const float* p) { differentiate_rows(pass, block, rows, group, p); });
}

// What needs all columns: dw and gb.
void finish_rows(const Pass& pass, Block& block, Range rows, Worker& worker, const Fetch& /*next*/) {
  const float* parts = block[kDw].floats();
  const std::int64_t num_parts = pass.intermediate_padded / kPanelRows;
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    float sum = 0;
    for (std::int64_t part = 0; part < num_parts; ++part) sum += parts[part * block.num_rows() + row];
    const auto index = static_cast<std::size_t>(block.begin + row);
    pass.backward_items[static_cast<std::size_t>(pass.routes.item[index])].dw[pass.routes.route[index]] = sum;
  }
  project(pass, LoraLayer::kGateUpB, block, rows, worker);
}

// dG|dU·gate_up + (s·gb)·gate_up_a, per route.
void grad_x(const Pass& pass, Block& block, Range panels, Worker& worker, const Fetch& next) {
  const Product product = {pass.gate_up_w(block.expert), lora_matrix(pass, LoraLayer::kGateUpA, block.expert), true};
  multiply_to_out(pass, product, kGateUp, block, panels, worker, next);
}

// S of one tensor of one expert, over `rows` of a block; ARCHITECTURE.md, dA and dB:
//   s·(dG·Bg)ᵀ·X   s·dGᵀ·(X·Agᵀ)   U like G   s·(w·dY·Bd)ᵀ·Z   s·(w·dY)ᵀ·(Z·Adᵀ)
void accumulate_rows(const Pass& pass, Block& block, Range rows, AdapterTensor which) {
  const LoraLayer::Tensor& tensor = pass.accumulate_to->tensor(which);
  if (tensor.shape.rows == 0) return;
  const LoraLayer::Part part = LoraLayer::part_of(which);
  const bool is_b = part == LoraLayer::kGateUpB || part == LoraLayer::kDownB;
  const bool is_down = part == LoraLayer::kDownA || part == LoraLayer::kDownB;
  const bool is_up = which == AdapterTensor::kUpA || which == AdapterTensor::kUpB;
  const std::int64_t width = (is_down ? pass.down_rank : pass.gate_up_rank).width;
  const Operand narrow = is_down ? (is_b ? kZa : kYb) : (is_b ? kXa : kGb);
  const Operand wide = is_down ? (is_b ? kDy : kZ) : (is_b ? kGateUp : kX);
  const float* left = floats_of(block, narrow, rows.begin, width) + (is_up ? pass.lora->up_column() : 0);
  const Rows right = rows_of(pass, block, wide, rows.begin);
  // Panels of dG and dU alternate.
  const std::int64_t panel_step = wide == kGateUp ? 2 * kPanelRows : kPanelRows;
  const std::int64_t first_column = wide == kGateUp && is_up ? kPanelRows : 0;
  pass.table.lora_wgrad(
      {.left = left,
       .ld_left = width,
       .right = right.data + first_column * pass.element_bytes,
       .ld_right = right.ld,
       .panel_step = panel_step,
       .row_scale = is_down ? pass.routes.weight.data() + block.begin + rows.begin : nullptr,
       .scale = static_cast<float>((is_down ? pass.lora->spec.down : pass.lora->spec.gate_up).scaling),
       .m = rows.count(),
       .r = is_b ? tensor.shape.cols : tensor.shape.rows,
       .n = is_b ? tensor.shape.rows : tensor.shape.cols,
       .grad = tensor.s + block.expert * tensor.expert_size(),
       .ld_grad = tensor.shape.cols,
       .transposed = is_b});
}

// All rows of some tensors, in the blocks in which a whole expert would be computed. `kFirst`: the half's first one.
template <AdapterTensor kFirst>
void accumulate(const Pass& pass, Block& block, Range tensors, Worker& /*worker*/, const Fetch& /*next*/) {
  const RowBlocks blocks(block.num_rows(), pass.rows_max);
  for (std::int64_t tensor = tensors.begin; tensor < tensors.end; ++tensor) {
    const auto which = static_cast<AdapterTensor>(static_cast<std::int64_t>(kFirst) + tensor);
    for (std::int64_t b = 0; b < blocks.num_blocks; ++b) {
      accumulate_rows(pass, block, {blocks.begin(b), blocks.begin(b + 1)}, which);
    }
  }
}

}  // namespace

StageList backward_stages(const Pass& pass) {
  const Operands dy_again = when(pass.adapts_down(), kDy);
  const bool adapts_gate_up = pass.adapts_gate_up();
  const Operands g_and_u = pass.recompute ? kGateUp : kKept;
  const Operands z = when(keeps_z(pass), kZ);
  StageList stages;
  if (pass.recompute) {
    stages.push_back(gather_x_stage(pass));
    stages.push_back(gate_up_stage(kGateUp));
  }
  stages.push_back({StageId::kGatherDy, Division::kRows, gather_dy, kGradOutput | kDownLoraB | dy_again, kDy | kYb});
  stages.push_back({StageId::kDifferentiate, Division::kTransposed, differentiate,
                    kDy | kYb | kDownW | kDownLoraA | g_and_u, kGateUp | kDw | z});
  if (keeps_z(pass)) {
    stages.push_back(project_z_stage());
    stages.push_back({StageId::kLoraGradients, Division::kTensors, accumulate<AdapterTensor::kDownA>,
                      kDy | kYb | kZ | kZa, kDownSums});
  }
  stages.push_back({StageId::kFinishRows, Division::kRows, finish_rows,
                    kDw | kGateUpLoraB | when(adapts_gate_up, kGateUp), when(adapts_gate_up, kGb)});
  stages.push_back({StageId::kGradX, Division::kTransposed, grad_x, kGateUp | kGb | kGateUpW | kGateUpLoraA, kOut});
  if (pass.accumulate_to != nullptr && adapts_gate_up) {
    if (!pass.recompute) stages.push_back(gather_x_stage(pass));
    stages.push_back({StageId::kLoraGradients, Division::kTensors, accumulate<AdapterTensor::kGateA>,
                      kX | kXa | kGateUp | kGb, kGateUpSums});
  }
  return stages;
}

}  // namespace kt::coproc
