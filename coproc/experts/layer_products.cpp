// The products of the experts: weights and LoRA matrices, as they lie and transposed.
#include <algorithm>

#include "coproc/experts/layer_state.h"

namespace kt::coproc {
namespace {

using kernels::Fetch;
using kernels::kPanelRows;
using kernels::Panels;

// Panels of W that make a piece of Wᵀ: 32 KiB of bf16 for a pair, which the product finds in L1 or L2.
constexpr std::int64_t kPiecePanels = 8;
// With so few rows a product is shorter than the transposition before it, which then brings the next piece.
constexpr std::int64_t kFewRows = 4;

// LoRA's packed matrix as any other.
WeightMatrix matrix(const Panels& w) { return {w.data, w.stride, w.num_panels, w.k, std::nullopt}; }

}  // namespace

void ExpertCompute::State::multiply(const WeightMatrix& w, Range panels, const Rows& a, std::int64_t m, const Tile& c,
                                    Worker& worker, const Fetch& next) const {
  if (w.quantised && m <= table.quantised_rows_max) {
    return table.quantised_gemm(a.data, a.ld, m, w.integers(panels.begin, panels.count()), c.data, c.ld, next);
  }
  const Panels elements = w.elements(table, panels.begin, panels.count(), worker.weights);
  table.gemm(a.data, a.ld, m, elements, c.data, c.ld, c.accumulate, next);
}

void ExpertCompute::State::multiply_transposed(const WeightMatrix& w, Range panels, const Rows& a, std::int64_t m,
                                               const Tile& c, Worker& worker, const Fetch& next) const {
  WeightMatrix::Piece piece = {panels.begin, panels.count(), 0, std::min(kPiecePanels, w.num_panels)};
  while (true) {
    WeightMatrix::Piece following = piece;
    following.first += piece.num_panels;
    following.num_panels = std::min(kPiecePanels, w.num_panels - following.first);
    const bool is_last = following.num_panels == 0;
    const Fetch fetch = is_last ? next : w.fetch(following, eb);
    const bool few = m <= kFewRows;
    const Panels wt = w.transpose(table, piece, worker.transposed, worker.weights, few ? fetch : Fetch{});
    table.gemm(a.data + piece.first * kPanelRows * eb, a.ld, m, wt, c.data, c.ld, c.accumulate || piece.first > 0,
               few ? Fetch{} : fetch);
    if (is_last) return;
    piece = following;
  }
}

void ExpertCompute::State::project(Range rows, const Rows& a, const Panels& w, double scale, Projection& to,
                                   Worker& worker) const {
  const std::int64_t rank = w.num_panels * kPanelRows;
  float* values = to.values.floats() + rows.begin * rank;
  multiply(matrix(w), {0, w.num_panels}, a, rows.count(), {values, rank}, worker, {});
  table.round_rows(values, rank, rows.count(), rank, static_cast<float>(scale),
                   to.rounded.data() + rows.begin * rank * eb, rank);
}

void ExpertCompute::State::project_transposed(Range rows, const Rows& a, const Panels& w, double scale, Projection& to,
                                              Worker& worker) const {
  const std::int64_t rank = w.k;
  float* values = to.values.floats() + rows.begin * rank;
  for_each_pair({0, rank / kPanelRows}, [&](Range pair) {
    multiply_transposed(matrix(w), pair, a, rows.count(), {values + pair.begin * kPanelRows, rank}, worker, {});
  });
  table.round_rows(values, rank, rows.count(), rank, static_cast<float>(scale),
                   to.rounded.data() + rows.begin * rank * eb, rank);
}

void ExpertCompute::State::add_lora(const Projection& from, LoraRank rank, Range rows, const Panels& w, Range panels,
                                    const Tile& c, Worker& worker) const {
  if (rank.width == 0) return;
  Panels narrow = w;
  narrow.k = rank.depth;
  multiply(matrix(narrow), panels, rows_of(from.rounded, rows.begin, rank.width), rows.count(), {c.data, c.ld, true},
           worker, {});
}

void ExpertCompute::State::add_lora_transposed(const Projection& from, LoraRank rank, Range rows, const Panels& w,
                                               Range panels, const Tile& c, Worker& worker) const {
  if (rank.width == 0) return;
  multiply_transposed(matrix(w), panels, rows_of(from.rounded, rows.begin, rank.width), rows.count(),
                      {c.data, c.ld, true}, worker, {});
}

Fetch ExpertCompute::State::next_pair(const WeightMatrix& w, Range pair, std::int64_t end, const Fetch& after) {
  return pair.end < end ? w.fetch(pair.end, std::min(kPair, end - pair.end)) : after;
}

Fetch ExpertCompute::State::next_transposed(const WeightMatrix& w, Range pair, std::int64_t end,
                                            const Fetch& after) const {
  if (pair.end >= end) return after;
  return w.fetch(
      WeightMatrix::Piece{pair.end, std::min(kPair, end - pair.end), 0, std::min(kPiecePanels, w.num_panels)}, eb);
}

}  // namespace kt::coproc
