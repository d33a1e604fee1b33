#include "coproc/experts/products.h"

namespace kt::coproc {
namespace {

using kernels::Fetch;
using kernels::kPanelRows;
using kernels::Panels;

constexpr std::int64_t kFewRows = 4;  // A product of so few is shorter than bringing its weights.

// Panels of W in the piece of a group of `count` panels of Wᵀ that begins with panel `first`: 32 KiB of bf16, which
// the product finds in L1 or L2; with few rows 8 KiB, so that all is in L1 together with what is fetched meanwhile.
std::int64_t piece_panels(const WeightMatrix& w, std::int64_t count, std::int64_t first) {
  return std::min<std::int64_t>(count > kPair ? 1 : 8, w.num_panels - first);
}

// LoRA's blocks behind a transposed product are too small to be fetched between its steps: all of them before it.
void fetch_all(const Fetch& fetch) {
  constexpr std::int64_t kLineBytes = 64;
  for (std::int64_t block = 0; block < fetch.count; ++block) {
    const std::byte* data = fetch.data + block * fetch.stride;
    for (std::int64_t at = 0; at < fetch.block_bytes; at += kLineBytes) __builtin_prefetch(data + at, 0, 2);
  }
}

void multiply_plain(const Pass& pass, const Product& product, Range panels, const Rows& a, std::int64_t m,
                    const Tile& c, Worker& worker, const Fetch& next) {
  const kernels::KernelTable& table = pass.table;
  const WeightMatrix& w = product.w;
  const LoraMatrix& lora = product.lora;
  Panels more;
  if (lora.rank.width > 0) {
    more = {lora.panels.data + panels.begin * lora.panels.stride, lora.panels.stride, panels.count(), lora.rank.depth};
  }
  if (w.quantised != nullptr && m <= w.quantised->gemm_rows_max) {
    w.quantised->gemm(a.data, a.ld, m, w.codes(panels.begin, panels.count()), c.data, c.ld, next);
    if (more.k > 0) table.gemm(a.data + w.k * pass.element_bytes, a.ld, m, more, c.data, c.ld, true, {});
    return;
  }
  Panels elements = w.elements(table, panels.begin, panels.count(), worker.weights);
  if (more.k > 0) elements.more = &more;
  table.gemm(a.data, a.ld, m, elements, c.data, c.ld, false, next);
}

// Pieces of Wᵀ are made in scratch, 32 KiB at a time. LoRA's rows of Wᵀ come behind those of the last piece.
void multiply_transposed(const Pass& pass, const Product& product, Range panels, const Rows& a, std::int64_t m,
                         const Tile& c, Worker& worker, const Fetch& next) {
  const WeightMatrix& w = product.w;
  const LoraMatrix& lora = product.lora;
  const std::int64_t element_bytes = pass.element_bytes;
  const std::int64_t block_bytes = kPanelRows * kPanelRows * element_bytes;
  if (lora.rank.width > 0) {
    fetch_all({lora.panels.data + panels.begin * block_bytes, panels.count() * block_bytes, lora.panels.stride,
               lora.panels.num_panels});
  }
  const bool few = m <= kFewRows;
  WeightMatrix::Piece piece = {panels.begin, panels.count(), 0, piece_panels(w, panels.count(), 0)};
  while (true) {
    WeightMatrix::Piece following = piece;
    following.first += piece.num_panels;
    following.num_panels = piece_panels(w, panels.count(), following.first);
    const bool is_last = following.num_panels == 0;
    const Fetch fetch = is_last ? next : w.fetch(following, element_bytes);
    Panels wt = w.transpose(pass.table, piece, is_last ? lora.panels : Panels{}, worker.transposed, worker.weights,
                            few ? fetch : Fetch{});
    wt.last_rows = product.last_rows;
    if (is_last) wt.k += lora.rank.depth;
    pass.table.gemm(a.data + piece.first * kPanelRows * element_bytes, a.ld, m, wt, c.data, c.ld, piece.first > 0,
                    few ? Fetch{} : fetch);
    if (is_last) return;
    piece = following;
  }
}

}  // namespace

LoraMatrix lora_matrix(const Pass& pass, LoraLayer::Part part, std::int32_t expert) {
  const bool is_down = part == LoraLayer::kDownA || part == LoraLayer::kDownB;
  const LoraRank& rank = is_down ? pass.down_rank : pass.gate_up_rank;
  if (rank.width == 0) return {};
  return {pass.lora->packed(part, expert), rank};
}

Rows rows_of(const Pass& pass, Block& block, Operand array, std::int64_t row) {
  const std::int64_t ld = pass.leading_dimension(array);
  return {block[array].data() + row * ld * pass.element_bytes, ld};
}

void multiply(const Pass& pass, const Product& product, Range panels, const Rows& a, std::int64_t m, const Tile& c,
              Worker& worker, const Fetch& next) {
  (product.transposed ? multiply_transposed : multiply_plain)(pass, product, panels, a, m, c, worker, next);
}

// With few rows reading W is all that counts, and memory gives 8 KiB of each panel of W faster than 4 KiB.
std::int64_t panels_of_group(bool transposed, std::int64_t num_rows) {
  return transposed && num_rows <= kFewRows ? 2 * kPair : kPair;
}

Fetch first_of(const Pass& pass, const WeightMatrix& w, bool transposed, Range panels, std::int64_t num_rows) {
  const std::int64_t count = std::min(panels_of_group(transposed, num_rows), panels.count());
  if (!transposed) return w.fetch(panels.begin, count);
  return w.fetch(WeightMatrix::Piece{panels.begin, count, 0, piece_panels(w, count, 0)}, pass.element_bytes);
}

void multiply_to_out(const Pass& pass, const Product& product, Operand a, Block& block, Range panels, Worker& worker,
                     const Fetch& after) {
  multiply_block(pass, product, a, block, panels, worker, after, [&](Range rows, Range group, const float* tile) {
    const std::int64_t columns = group.count() * kPanelRows;
    const std::int64_t at = rows.begin * pass.hidden_padded + group.begin * kPanelRows;
    pass.table.round_rows(tile, columns, rows.count(), columns, 1.0f, block.out + at * pass.element_bytes,
                          pass.hidden_padded);
  });
}

void project(const Pass& pass, LoraLayer::Part part, Block& block, Range rows, Worker& worker) {
  constexpr Operand kFrom[] = {kX, kGateUp, kZ, kDy};  // By Part.
  constexpr Operand kTo[] = {kXa, kGb, kZa, kYb};
  const LoraMatrix lora = lora_matrix(pass, part, block.expert);
  const std::int64_t width = lora.rank.width;
  if (width == 0) return;
  const bool transposed = part == LoraLayer::kGateUpB || part == LoraLayer::kDownB;
  const bool is_down = part == LoraLayer::kDownA || part == LoraLayer::kDownB;
  const Rows a = rows_of(pass, block, kFrom[part], rows.begin);
  float* values = floats_of(block, kTo[part], rows.begin, width);
  Panels w = lora.panels;
  if (transposed) {
    const std::int64_t num_panels = width / kPanelRows;
    Product product = {{w.data, w.stride, w.num_panels, w.k}, {}, true};  // As any other matrix.
    for (std::int64_t first = 0; first < num_panels; first += kPair) {
      const Range pair = {first, std::min(first + kPair, num_panels)};
      product.last_rows = pair.end == num_panels ? lora.rank.used_of_last_panel() : kPanelRows;
      multiply(pass, product, pair, a, rows.count(), {values + first * kPanelRows, width}, worker, {});
    }
  } else {
    w.last_rows = lora.rank.used_of_last_panel();
    pass.table.gemm(a.data, a.ld, rows.count(), w, values, width, false, {});
  }
  const std::int64_t columns = transposed ? w.num_panels * kPanelRows : w.k;  // Of the array.
  pass.table.round_rows(values, width, rows.count(), width,
                        static_cast<float>((is_down ? pass.lora->spec.down : pass.lora->spec.gate_up).scaling),
                        a.data + columns * pass.element_bytes, a.ld);
}

}  // namespace kt::coproc
