// gemm on the tiles of AMX_BF16: the loop nests of nest.inl, one instruction for each operation of a Tile.
//
// Configuration and contents of tiles belong to a thread. gemm configures them in every call and releases them at its
// end, so that nothing depends on the calls before it, no context switch saves 8 KB for a worker that does something
// else, and a core with released tiles may sleep deeply. Permission to use them belongs to the process and was asked
// for before this table was chosen (cpu_features.cpp).
//
// The wrappers are our own: g++ 12's _tile_loadconfig declares 8 of the 64 bytes it reads and _tile_loadd none. Here a
// configuration is an operand of its full size; the rows of a tile, `stride` bytes apart, are no single object, so
// moves of tiles declare all of memory.
#pragma once
#include "kernels/amx/nest.inl"
#include "kernels/avx512/transpose.inl"
#include "kernels/generic/continued_gemm.inl"

namespace kt::kernels::KT_TABLE {
namespace {

constexpr std::int64_t kDepthMultiple = kStep;  // KernelTable::k_multiple

struct HardwareTile {
  void configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
  void release() { __asm__ volatile("tilerelease"); }

  template <int kTile>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  void load(const void* rows, std::int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  void store(void* rows, std::int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
  }
  // c += a · b.
  template <int kC, int kA, int kB>
  void dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};

void multiply_all(const void* a, std::int64_t lda, std::int64_t m, const Panels& w, float* c, std::int64_t ldc,
                  bool accumulate, const Fetch& next) {
  HardwareTile tile;
  multiply(tile, {static_cast<const Element*>(a), lda, w, c, ldc, accumulate, next}, m);
}

constexpr auto gemm = continued_gemm<multiply_all>;

}  // namespace
}  // namespace kt::kernels::KT_TABLE
