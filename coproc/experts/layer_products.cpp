// The products of the experts: weights and LoRA matrices, as they lie and transposed.
#include <algorithm>

#include "coproc/experts/layer_state.h"

namespace kt::coproc {
namespace {

using kernels::Fetch;
using kernels::kPanelRows;
using kernels::Panels;

// LoRA's matrices are too small for a kernel to fetch on the way: the next pair's part, while this one is at work.
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
  WeightMatrix::Piece piece = {panels.begin, panels.count(), 0, piece_panels(w, panels.count(), 0)};
  while (true) {
    WeightMatrix::Piece following = piece;
    following.first += piece.num_panels;
    following.num_panels = piece_panels(w, panels.count(), following.first);
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
  fetch_all(next_pair(matrix(w), panels, w.num_panels, {}));
  multiply(matrix(narrow), panels, rows_of(from.rounded, rows.begin, rank.width), rows.count(), {c.data, c.ld, true},
           worker, {});
}

void ExpertCompute::State::add_lora_transposed(const Projection& from, LoraRank rank, Range rows, const Panels& w,
                                               Range panels, const Tile& c, Worker& worker) const {
  if (rank.width == 0) return;
  fetch_all(next_transposed(matrix(w), panels, panels.count(), w.k / kPanelRows, {}));
  const WeightMatrix::Piece all = {panels.begin, panels.count(), 0, w.num_panels};
  Panels narrow = matrix(w).transpose(table, all, worker.transposed, worker.weights, {});
  narrow.k = rank.depth;
  table.gemm(from.rounded.data() + rows.begin * rank.width * eb, rank.width, rows.count(), narrow, c.data, c.ld, true,
             {});
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
