// The tiles of one thread on a CPU without AMX: configuration, contents, and what instructions do to them.
//
//   tmm0-7   rows[t] ≤ 16 rows of row_bytes[t] ≤ 64 bytes; all bytes outside are zero
//
// Source: Intel Instruction Set Reference, LDTILECFG, TILELOADD, TILESTORED, TDPBF16PS.
//
// INVARIANTS
//   A1 Strict: an operation that hardware would refuse returns the reason and changes nothing.
//   A2 Usable in a signal handler: no allocation, no locks, constant initialisation, trivial destruction.
#pragma once
#include <cstdint>

namespace kt::test {

// What was done, for the speed model: on Intel's cores TDPBF16PS takes a cycle per row of A, TILELOADD half a cycle and
// TILESTORED a cycle per row; 16, 8 and 16 for whole tiles (Intel Optimization Reference Manual).
struct TileCounts {
  std::uint64_t configures = 0;
  std::uint64_t loads = 0;
  std::uint64_t load_rows = 0;
  std::uint64_t load_bytes = 0;
  std::uint64_t stores = 0;
  std::uint64_t store_rows = 0;
  std::uint64_t dots = 0;
  std::uint64_t dot_rows = 0;
  // Fewest TDPBF16PS from one that wrote an accumulator to the next one that adds to it; loads, stores and zeroing of
  // the accumulator start anew.
  std::uint64_t dot_distance_min = ~std::uint64_t{0};
};

class AmxTiles {
 public:
  const char* configure(const std::uint8_t* config);  // 64 bytes
  void release();
  const char* zero(int t);
  const char* load(int t, const std::uint8_t* from, std::int64_t stride);
  const char* store(int t, std::uint8_t* to, std::int64_t stride);
  // c += a · b in bf16 pairs: per element two chains of fused fp32 additions from +0, over the even and the odd k, then
  // c + (even + odd). Needs AVX2 and FMA.
  const char* dot(int c, int a, int b);

  bool configured() const { return configured_; }
  const TileCounts& counts() const { return counts_; }

 private:
  static constexpr int kNumTiles = 8;
  static constexpr int kRowsMax = 16;
  static constexpr int kRowBytesMax = 64;
  struct alignas(64) Tile {
    std::uint8_t row[kRowsMax][kRowBytesMax] = {};
  };

  const char* refusal(int t) const;

  bool configured_ = false;
  std::uint8_t rows_[kNumTiles] = {};
  std::uint8_t row_bytes_[kNumTiles] = {};
  Tile tiles_[kNumTiles] = {};
  std::uint64_t last_dot_[kNumTiles] = {};  // its number, from 1; 0: none since the tile was set otherwise
  TileCounts counts_ = {};
};

}  // namespace kt::test
