// The products of the stages: weights and LoRA's matrices, as they lie and transposed.
#pragma once
#include <algorithm>

#include "coproc/experts/stage.h"

namespace kt::coproc {

inline constexpr std::int64_t kPair = 2;        // Panels multiplied at a time: 64 columns.
inline constexpr std::int64_t kTileRows = 256;  // Rows of a tile: 64 KiB of f32.
inline constexpr std::int64_t kTileFloats = kTileRows * kPair * kernels::kPanelRows;

// One of LoRA's packed matrices, of one expert. rank.width = 0: not adapted.
struct LoraMatrix {
  kernels::Panels panels;
  LoraRank rank;
};
LoraMatrix lora_matrix(const Pass& pass, LoraLayer::Part part, std::int32_t expert);

// Where rows of elements lie, and of f32 results.
struct Rows {
  std::byte* data = nullptr;
  std::int64_t ld = 0;  // Elements.
};
struct Tile {
  float* data = nullptr;
  std::int64_t ld = 0;
};
// From `row` on of an array of a block that holds elements, and of one that holds f32 of `width` columns.
Rows rows_of(const Pass& pass, Block& block, Operand array, std::int64_t row);
inline float* floats_of(Block& block, Operand array, std::int64_t row, std::int64_t width) {
  return block[array].floats() + row * width;
}

// C[m, 32·panels] of panels of W, or of the transpose of W:
//   as they lie   A[m, k | rank] · (W | LoRA's B)ᵀ
//   transposed    A[m, N | rank] · (W over LoRA's A), their columns 32·panels
struct Product {
  WeightMatrix w;
  LoraMatrix lora;
  bool transposed = false;
  // Of the transpose's last panel: the columns that are not zero.
  std::int64_t last_rows = kernels::kPanelRows;
};
void multiply(const Pass& pass, const Product& product, Range panels, const Rows& a, std::int64_t m, const Tile& c,
              Worker& worker, const kernels::Fetch& next);

// Panels of the product that are multiplied at a time, for so many rows.
std::int64_t panels_of_group(bool transposed, std::int64_t num_rows);
// What a product reads first of `panels`.
kernels::Fetch first_of(const Pass& pass, const WeightMatrix& w, bool transposed, Range panels, std::int64_t num_rows);

// All rows of a block, and `panels` of the product, group by group: consume(rows, group of panels, f32 tile).
template <class Consume>
void multiply_block(const Pass& pass, const Product& product, Operand a, Block& block, Range panels, Worker& worker,
                    const kernels::Fetch& after, const Consume& consume) {
  float* tile = worker.tile.ensure_floats(kTileFloats);
  const std::int64_t count = panels_of_group(product.transposed, block.num_rows());
  for (std::int64_t first = panels.begin; first < panels.end; first += count) {
    const Range group = {first, std::min(first + count, panels.end)};
    const Range following = {group.end, std::min(group.end + count, panels.end)};
    const kernels::Fetch next =
        following.count() > 0 ? first_of(pass, product.w, product.transposed, following, block.num_rows()) : after;
    const Tile c = {tile, group.count() * kernels::kPanelRows};
    for (std::int64_t row = 0; row < block.num_rows(); row += kTileRows) {
      const Range rows = {row, std::min(row + kTileRows, block.num_rows())};
      const bool fetches = product.transposed || row == 0;
      multiply(pass, product, group, rows_of(pass, block, a, row), rows.count(), c, worker,
               fetches ? next : kernels::Fetch{});
      consume(rows, group, tile);
    }
  }
}
// The same with every tile rounded to where its rows and columns belong in the block's results.
void multiply_to_out(const Pass& pass, const Product& product, Operand a, Block& block, Range panels, Worker& worker,
                     const kernels::Fetch& after);

// `rows` of an array of the block from [T, H] arrays: source_of(item) is that of an item.
template <class SourceOf>
void gather(const Pass& pass, Block& block, Operand array, Range rows, const SourceOf& source_of) {
  for_each_run(pass.routes, block.begin + rows.begin, block.begin + rows.end,
               [&](std::size_t item, std::int64_t first, std::int64_t stop) {
                 const Rows to = rows_of(pass, block, array, first - block.begin);
                 pass.table.gather(source_of(item), pass.hidden, pass.routes.token.data() + first, stop - first,
                                   pass.hidden, pass.hidden_padded, to.data, to.ld);
               });
}

// `rows` of X or Z by A of their half, of dY or dG|dU by B: projected to LoRA's rank in f32 (xa, za, yb or gb), and the
// same scaled and rounded behind the columns of the array.
void project(const Pass& pass, LoraLayer::Part part, Block& block, Range rows, Worker& worker);

}  // namespace kt::coproc
