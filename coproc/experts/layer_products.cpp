// The products of the experts: weights and LoRA matrices, as they lie and transposed.
#include <algorithm>

#include "coproc/experts/layer_state.h"

namespace kt::coproc {
namespace {

using kernels::Fetch;
using kernels::kPanelRows;
using kernels::Panels;

// LoRA's blocks behind a transposed product are too small to be fetched between its steps: all of them before it.
void fetch_all(const Fetch& fetch) {
  constexpr std::int64_t kLineBytes = 64;
  for (std::int64_t block = 0; block < fetch.count; ++block) {
    const std::byte* data = fetch.data + block * fetch.stride;
    for (std::int64_t at = 0; at < fetch.block_bytes; at += kLineBytes) __builtin_prefetch(data + at, 0, 2);
  }
}

// LoRA's packed matrix as any other.
WeightMatrix matrix(const Panels& w) { return {w.data, w.stride, w.num_panels, w.k, std::nullopt}; }

}  // namespace

LoraMatrix ExpertCompute::State::lora_matrix(const Pass& pass, LoraLayer::Part part, std::int32_t expert) const {
  const bool is_down = part == LoraLayer::kDownA || part == LoraLayer::kDownB;
  const LoraRank& rank = is_down ? rank_d : rank_a;
  if (rank.width == 0) return {};
  return {pass.lora->packed(part, expert), rank};
}

void ExpertCompute::State::multiply(const WeightMatrix& w, const LoraMatrix& lora, Range panels, const Rows& a,
                                    std::int64_t m, const Tile& c, Worker& worker, const Fetch& next) const {
  Panels more;
  if (lora.rank.width > 0) {
    more = {lora.panels.data + panels.begin * lora.panels.stride, lora.panels.stride, panels.count(), lora.rank.depth};
  }
  if (w.quantised && m <= table.quantised_rows_max) {
    table.quantised_gemm(a.data, a.ld, m, w.integers(panels.begin, panels.count()), c.data, c.ld, next);
    if (more.k > 0) table.gemm(a.data + w.k * eb, a.ld, m, more, c.data, c.ld, true, {});
    return;
  }
  Panels elements = w.elements(table, panels.begin, panels.count(), worker.weights);
  if (more.k > 0) elements.more = &more;
  table.gemm(a.data, a.ld, m, elements, c.data, c.ld, false, next);
}

// LoRA's rows of Wᵀ come behind those of the last piece.
void ExpertCompute::State::multiply_transposed(const WeightMatrix& w, const LoraMatrix& lora, Range panels,
                                               const Rows& a, std::int64_t m, const Tile& c, Worker& worker,
                                               const Fetch& next, std::int64_t last_rows) const {
  const std::int64_t block_bytes = kPanelRows * kPanelRows * eb;
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
    const Fetch fetch = is_last ? next : w.fetch(following, eb);
    Panels wt = w.transpose(table, piece, is_last ? lora.panels : Panels{}, worker.transposed, worker.weights,
                            few ? fetch : Fetch{});
    wt.last_rows = last_rows;
    if (is_last) wt.k += lora.rank.depth;
    table.gemm(a.data + piece.first * kPanelRows * eb, a.ld, m, wt, c.data, c.ld, piece.first > 0,
               few ? Fetch{} : fetch);
    if (is_last) return;
    piece = following;
  }
}

void ExpertCompute::State::project(const LoraMatrix& lora, double scale, const Rows& a, std::int64_t m,
                                   float* values) const {
  if (lora.rank.width == 0) return;
  Panels w = lora.panels;
  w.last_rows = lora.rank.used_of_last_panel();
  table.gemm(a.data, a.ld, m, w, values, lora.rank.width, false, {});
  table.round_rows(values, lora.rank.width, m, lora.rank.width, static_cast<float>(scale), a.data + w.k * eb, a.ld);
}

void ExpertCompute::State::project_transposed(const LoraMatrix& lora, double scale, const Rows& a, std::int64_t m,
                                              float* values, Worker& worker) const {
  if (lora.rank.width == 0) return;
  const std::int64_t num_panels = lora.rank.width / kPanelRows;
  for_each_pair({0, num_panels}, [&](Range pair) {
    multiply_transposed(matrix(lora.panels), {}, pair, a, m, {values + pair.begin * kPanelRows, lora.rank.width},
                        worker, {}, pair.end == num_panels ? lora.rank.used_of_last_panel() : kPanelRows);
  });
  table.round_rows(values, lora.rank.width, m, lora.rank.width, static_cast<float>(scale),
                   a.data + lora.panels.num_panels * kPanelRows * eb, a.ld);
}

Fetch ExpertCompute::State::next_pair(const WeightMatrix& w, Range pair, std::int64_t end, const Fetch& after) {
  return pair.end < end ? w.fetch(pair.end, std::min(kPair, end - pair.end)) : after;
}

Fetch ExpertCompute::State::next_transposed(const WeightMatrix& w, Range group, std::int64_t count, std::int64_t end,
                                            const Fetch& after) const {
  if (group.end >= end) return after;
  const std::int64_t next = std::min(count, end - group.end);
  return w.fetch(WeightMatrix::Piece{group.end, next, 0, piece_panels(w, next, 0)}, eb);
}

}  // namespace kt::coproc
