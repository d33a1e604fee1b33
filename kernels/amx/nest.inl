// The loop nests of gemm over tiles, for the processor's (gemm.inl) and for those the tests write in C++.
//
//   Block: 32 × 32 of C                     Strip: 16 × 64 of C, two panels, for m ≤ 16
//
//               tmm6    tmm7                            tmm5    tmm6  │ tmm7    tmm5     B: 32 of k × 16 columns
//             ┌───────┬───────┐                       ┌───────┬───────┬───────┬───────┐     of a panel, 16 rows of
//       tmm4  │ tmm0  │ tmm1  │  first rows     tmm4  │ tmm0  │ tmm1  │ tmm2  │ tmm3  │     64 bytes, 128 apart
//             ├───────┼───────┤                       └───────┴───────┴───────┴───────┘
//       tmm5  │ tmm2  │ tmm3  │  second rows     A: rows × 32 of k
//             └───────┴───────┘
//
// Per step (32 of k) each is 4 TDPBF16PS into 4 different accumulators; a Block loads 4 tiles for them, a Strip 5.
// Tiles have the rows that there are: m = 40 is a Block of 14 + 14 rows and a Strip of 12, never 48.
//
// An element of C is C += TDPBF16PS of k = 32s … 32s + 31, s ascending, whatever the shape: C is fp32 in tiles and in
// memory, so that neither row counts, nor panels, nor a K cut in blocks changes a bit.
//
// Tile offers configure, release, zero<t>, load<t>, store<t>, dot<c, a, b>.
#pragma once
#include "kernels/generic/fetch.inl"
#include "kernels/generic/panel.inl"

namespace kt::kernels::KT_TABLE {
namespace {

constexpr std::int64_t kTileRowsMax = 16;
constexpr std::int64_t kTileBytes = 64;                      // of one row of a tile: 32 bf16 or 16 floats
constexpr std::int64_t kStep = 32;                           // k of one TDPBF16PS
static_assert(kPairBytes == 2 * kTileBytes);                 // the stride of B tiles
constexpr std::int64_t kStepBytes = kStep / 2 * kPairBytes;  // one step of a panel

// What LDTILECFG reads (Intel SDM, "TILECFG register"). A tile of no rows has no bytes either.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, std::int64_t num_rows) {
    row_bytes[tile] = num_rows == 0 ? 0 : kTileBytes;
    rows[tile] = static_cast<std::uint8_t>(num_rows);
  }
};
static_assert(sizeof(TileConfig) == 64);

struct Product {
  const Element* a;
  std::int64_t lda;
  Panels w;
  float* c;
  std::int64_t ldc;
  bool accumulate;
  Fetch next;
};

// The rows of the first and second row tiles of a Block; second is 0 where there is only one row.
struct BlockRows {
  std::int64_t first;
  std::int64_t second;
};

constexpr BlockRows halves(std::int64_t rows) { return {(rows + 1) / 2, rows / 2}; }

TileConfig block_config(BlockRows rows) {
  TileConfig config;
  for (const int tile : {0, 1, 4}) config.set(tile, rows.first);
  for (const int tile : {2, 3, 5}) config.set(tile, rows.second);
  for (const int tile : {6, 7}) config.set(tile, kTileRowsMax);
  return config;
}

TileConfig strip_config(std::int64_t rows) {
  TileConfig config;
  for (const int tile : {0, 1, 2, 3, 4}) config.set(tile, rows);
  for (const int tile : {5, 6, 7}) config.set(tile, kTileRowsMax);
  return config;
}

// What to fetch while panels up to `panel` are multiplied: up to `count` panels behind them, behind the last what the
// caller reads next. Only the first pass over the panels fetches.
Fetch fetch_behind(const Product& p, std::int64_t panel, std::int64_t count, bool first_pass) {
  if (!first_pass) return {};
  const std::int64_t left = p.w.num_panels - panel - 1;
  if (left == 0) return p.next;
  return {p.w.data + (panel + 1) * p.w.stride, p.w.k / kStep * kStepBytes, p.w.stride, left < count ? left : count};
}

template <int kTile, typename Tile>
void start_sum(Tile& tile, const float* c, std::int64_t ldc, bool accumulate) {
  if (accumulate) {
    tile.template load<kTile>(c, ldc * 4);
  } else {
    tile.template zero<kTile>();
  }
}

// Adds steps [begin, end) to one Block: rows of A and C from `row`, columns of `panel`. kTwo: it has second rows.
template <bool kTwo, typename Tile>
void multiply_block(Tile& tile, const Product& p, std::int64_t row, BlockRows rows, std::int64_t panel,
                    std::int64_t begin, std::int64_t end, Fetcher& fetcher) {
  const bool accumulate = p.accumulate || begin > 0;
  float* c = p.c + row * p.ldc + panel * kPanelRows;
  float* c_second = c + rows.first * p.ldc;
  start_sum<0>(tile, c, p.ldc, accumulate);
  start_sum<1>(tile, c + 16, p.ldc, accumulate);
  if constexpr (kTwo) {
    start_sum<2>(tile, c_second, p.ldc, accumulate);
    start_sum<3>(tile, c_second + 16, p.ldc, accumulate);
  }
  for (std::int64_t step = begin; step < end; ++step) {
    const Element* a = p.a + row * p.lda + step * kStep;
    const std::byte* b = p.w.data + panel * p.w.stride + step * kStepBytes;
    tile.template load<6>(b, kPairBytes);
    tile.template load<4>(a, p.lda * 2);
    tile.template dot<0, 4, 6>();
    if constexpr (kTwo) {
      tile.template load<5>(a + rows.first * p.lda, p.lda * 2);
      tile.template dot<2, 5, 6>();  // the same B again: it is in place
    }
    tile.template load<7>(b + kTileBytes, kPairBytes);
    tile.template dot<1, 4, 7>();
    if constexpr (kTwo) tile.template dot<3, 5, 7>();
    fetcher.tick();
  }
  tile.template store<0>(c, p.ldc * 4);
  tile.template store<1>(c + 16, p.ldc * 4);
  if constexpr (kTwo) {
    tile.template store<2>(c_second, p.ldc * 4);
    tile.template store<3>(c_second + 16, p.ldc * 4);
  }
}

// All of k of one Strip: panels `panel` and `panel` + 1.
template <typename Tile>
void multiply_strip(Tile& tile, const Product& p, std::int64_t row, std::int64_t panel, bool first_pass) {
  Fetcher fetcher(fetch_behind(p, panel + 1, 2, first_pass), p.w.k / kStep);
  float* c = p.c + row * p.ldc + panel * kPanelRows;
  start_sum<0>(tile, c, p.ldc, p.accumulate);
  start_sum<1>(tile, c + 16, p.ldc, p.accumulate);
  start_sum<2>(tile, c + 32, p.ldc, p.accumulate);
  start_sum<3>(tile, c + 48, p.ldc, p.accumulate);
  for (std::int64_t step = 0; step < p.w.k / kStep; ++step) {
    const std::byte* b = p.w.data + panel * p.w.stride + step * kStepBytes;
    const std::byte* b_second = b + p.w.stride;
    tile.template load<4>(p.a + row * p.lda + step * kStep, p.lda * 2);
    tile.template load<5>(b, kPairBytes);
    tile.template dot<0, 4, 5>();
    tile.template load<6>(b + kTileBytes, kPairBytes);
    tile.template dot<1, 4, 6>();
    tile.template load<7>(b_second, kPairBytes);
    tile.template dot<2, 4, 7>();
    tile.template load<5>(b_second + kTileBytes, kPairBytes);
    tile.template dot<3, 4, 5>();
    fetcher.tick();
  }
  tile.template store<0>(c, p.ldc * 4);
  tile.template store<1>(c + 16, p.ldc * 4);
  tile.template store<2>(c + 32, p.ldc * 4);
  tile.template store<3>(c + 48, p.ldc * 4);
}

// `num_blocks` Blocks of equal rows from `row`, over panels [panel, …). Several Blocks take 256 of k at a time: 16 KB
// of the panel then stay in L1 for all of them, and only A comes from L2, 32 bytes a cycle (Intel's L2 gives 48, not
// the 64 that A and B would need).
template <typename Tile>
void multiply_blocks(Tile& tile, const Product& p, std::int64_t row, std::int64_t num_blocks, BlockRows rows,
                     std::int64_t panel, bool first_pass) {
  constexpr std::int64_t kStepsInL1 = 8;
  const std::int64_t num_steps = p.w.k / kStep;
  const std::int64_t steps = num_blocks > 1 && num_steps > kStepsInL1 ? kStepsInL1 : num_steps;
  tile.configure(block_config(rows));
  for (; panel < p.w.num_panels; ++panel) {
    Fetcher fetcher(fetch_behind(p, panel, 1, first_pass), num_blocks * num_steps);
    std::int64_t begin = 0;
    do {  // once for k = 0 too: C becomes zero
      const std::int64_t end = begin + steps < num_steps ? begin + steps : num_steps;
      for (std::int64_t block = 0; block < num_blocks; ++block) {
        const std::int64_t first = row + block * (rows.first + rows.second);
        const auto multiply = rows.second > 0 ? multiply_block<true, Tile> : multiply_block<false, Tile>;
        multiply(tile, p, first, rows, panel, begin, end, fetcher);
      }
      begin = end;
    } while (begin < num_steps);
  }
}

// Up to 16 rows: Strips, and for a lone last panel a Block of the two halves of the rows, which keeps four accumulators
// in flight.
template <typename Tile>
void multiply_few_rows(Tile& tile, const Product& p, std::int64_t row, std::int64_t rows, bool first_pass) {
  const std::int64_t num_paired = p.w.num_panels / 2 * 2;
  if (num_paired > 0) tile.configure(strip_config(rows));
  for (std::int64_t panel = 0; panel < num_paired; panel += 2) multiply_strip(tile, p, row, panel, first_pass);
  if (num_paired < p.w.num_panels) multiply_blocks(tile, p, row, 1, halves(rows), num_paired, first_pass);
}

// Row tiles as few and as equal as can be: Blocks of one size, then the rest, for which the panels are in L2.
template <typename Tile>
void multiply(Tile& tile, const Product& p, std::int64_t m) {
  if (m <= 0) return;
  const std::int64_t num_row_tiles = (m + kTileRowsMax - 1) / kTileRowsMax;
  const std::int64_t tile_rows = (m + num_row_tiles - 1) / num_row_tiles;
  const std::int64_t num_blocks = m <= kTileRowsMax ? 0 : m / (2 * tile_rows);
  const std::int64_t done = num_blocks * 2 * tile_rows;
  const std::int64_t rest = m - done;
  if (num_blocks > 0) multiply_blocks(tile, p, 0, num_blocks, {tile_rows, tile_rows}, 0, true);
  if (rest > kTileRowsMax) {
    multiply_blocks(tile, p, done, 1, halves(rest), 0, num_blocks == 0);
  } else if (rest > 0) {
    multiply_few_rows(tile, p, done, rest, num_blocks == 0);
  }
  tile.release();
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
