#include "coproc/experts/stages_forward.h"

#include "coproc/experts/products.h"

namespace kt::coproc {
namespace {

using kernels::Fetch;
using kernels::kPanelRows;

// A group's columns of G and U through the activation; kept where forward is asked to, or backward needs them.
void activate(const Pass& pass, Block& block, Range rows, Range panels, const float* tile) {
  const std::int64_t columns = panels.count() * kPanelRows;
  const std::int64_t first_column = panels.begin * kPanelRows;
  const auto activate_rows = [&](Range part, std::byte* saved, std::int64_t ld_saved, const std::int32_t* saved_row) {
    const Rows z = rows_of(pass, block, kZ, part.begin);
    pass.table.activate({.activation = pass.activation,
                         .m = part.count(),
                         .n = columns / 2,
                         .gate_up = tile + (part.begin - rows.begin) * columns,
                         .ld_gate_up = columns,
                         .saved = saved == nullptr ? nullptr : saved + first_column * pass.element_bytes,
                         .ld_saved = ld_saved,
                         .saved_row = saved_row,
                         .z = z.data + first_column / 2 * pass.element_bytes,
                         .ld_z = z.ld});
  };
  if (!pass.is_forward()) {
    const Rows saved = rows_of(pass, block, kGateUp, rows.begin);
    return activate_rows(rows, saved.data, saved.ld, nullptr);
  }
  for_each_run(pass.routes, block.begin + rows.begin, block.begin + rows.end,
               [&](std::size_t item, std::int64_t first, std::int64_t stop) {
                 activate_rows({first - block.begin, stop - block.begin},
                               static_cast<std::byte*>(pass.forward_items[item].save_gate_up),
                               2 * pass.intermediate_padded, pass.routes.route.data() + first);
               });
}

void gather_x(const Pass& pass, Block& block, Range rows, Worker& worker, const Fetch& /*next*/) {
  gather(pass, block, kX, rows, [&](std::size_t item) -> const void* {
    return pass.is_forward() ? pass.forward_items[item].x : pass.backward_items[item].act->x.data();
  });
  project(pass, LoraLayer::kGateUpA, block, rows, worker);
}

void gate_up(const Pass& pass, Block& block, Range panels, Worker& worker, const Fetch& next) {
  const Product product = {pass.gate_up_w(block.expert), lora_matrix(pass, LoraLayer::kGateUpB, block.expert)};
  multiply_block(pass, product, kX, block, panels, worker, next,
                 [&](Range rows, Range group, const float* tile) { activate(pass, block, rows, group, tile); });
}

void project_z(const Pass& pass, Block& block, Range rows, Worker& worker, const Fetch& /*next*/) {
  project(pass, LoraLayer::kDownA, block, rows, worker);
}

void down(const Pass& pass, Block& block, Range panels, Worker& worker, const Fetch& next) {
  const Product product = {pass.down_w(block.expert), lora_matrix(pass, LoraLayer::kDownB, block.expert)};
  multiply_to_out(pass, product, kZ, block, panels, worker, next);
}

}  // namespace

Stage gather_x_stage(const Pass& pass) {
  const Operands x_again = when(pass.adapts_gate_up(), kX);
  return {StageId::kGatherX, Division::kRows, gather_x, kInput | x_again | kGateUpLoraA, kX | kXa};
}
Stage gate_up_stage(Operand keep) {
  return {StageId::kGateUp, Division::kPanels, gate_up, kX | kXa | kGateUpW | kGateUpLoraB, kZ | keep};
}
Stage project_z_stage() { return {StageId::kProjectZ, Division::kRows, project_z, kZ | kDownLoraA, kZa}; }

StageList forward_stages(const Pass& pass) {
  StageList stages = {gather_x_stage(pass), gate_up_stage(kKept)};
  if (pass.adapts_down()) stages.push_back(project_z_stage());
  stages.push_back({StageId::kDown, Division::kPanels, down, kZ | kZa | kDownW | kDownLoraB, kOut});
  return stages;
}

}  // namespace kt::coproc
