// gemm with AVX512_BF16. acc = fma(a odd, b odd, acc), then fma(a even, b even, acc): one VDPBF16PS
// per pair of k, pairs ascending, rounded to nearest, subnormals taken and given as zero. No include guard.
namespace {

// Register block: 6 rows × 64 columns = 24 accumulators and 4 vectors of B; A comes broadcast from memory.
constexpr std::int64_t kRowsMax = 6;

// acc + the pair of bf16 at `a` times 16 pairs of b.
inline F32 dot_pair(F32 acc, const Element* a, __m512bh b) {
  std::int32_t pair;
  __builtin_memcpy(&pair, a, sizeof pair);
  return _mm512_dpbf16_ps(acc, b, __builtin_bit_cast(__m512bh, _mm512_set1_epi32(pair)));
}

// C[R, 32·P] from R rows of A and P panels, `stride` bytes apart. One tick of the fetcher for each pair of k.
template <std::int64_t R, std::int64_t P>
void multiply_rows(const Element* a, std::int64_t lda, const std::byte* panel, std::int64_t stride, std::int64_t k,
                   float* c, std::int64_t ldc, bool accumulate, Fetcher& fetcher) {
  constexpr std::int64_t kVectors = 2 * P;
  Vectors<R * kVectors> acc;
  if (accumulate) {
    for (std::int64_t r = 0; r < R; ++r)
      for (std::int64_t v = 0; v < kVectors; ++v) acc[r * kVectors + v] = load(c + r * ldc + v * kLanes);
  }
  Fetcher fetch = fetcher;
  for (std::int64_t pair = 0; pair < k / 2; ++pair) {
    __m512bh b[static_cast<std::size_t>(kVectors)];
    for (std::int64_t v = 0; v < kVectors; ++v)
      __builtin_memcpy(&b[v], panel + v / 2 * stride + pair * kPairBytes + v % 2 * kLineBytes, kLineBytes);
    fetch.tick();
    for (std::int64_t r = 0; r < R; ++r)
      for (std::int64_t v = 0; v < kVectors; ++v)
        acc[r * kVectors + v] = dot_pair(acc[r * kVectors + v], a + r * lda + 2 * pair, b[v]);
  }
  fetcher = fetch;
  for (std::int64_t r = 0; r < R; ++r)
    for (std::int64_t v = 0; v < kVectors; ++v) store(c + r * ldc + v * kLanes, acc[r * kVectors + v]);
}

using MultiplyRows = void (*)(const Element*, std::int64_t, const std::byte*, std::int64_t, std::int64_t, float*,
                              std::int64_t, bool, Fetcher&);
template <std::int64_t P>
constexpr MultiplyRows kMultiplyRows[kRowsMax] = {multiply_rows<1, P>, multiply_rows<2, P>, multiply_rows<3, P>,
                                                  multiply_rows<4, P>, multiply_rows<5, P>, multiply_rows<6, P>};

// Chunks of rows as equal as can be: 7 rows are 4 + 3, not 6 + 1, whose single row would wait for its own additions.
void gemm(const void* a, std::int64_t lda, std::int64_t m, const Panels& w, float* c, std::int64_t ldc, bool accumulate,
          const Fetch& next) {
  const std::int64_t num_chunks = (m + kRowsMax - 1) / kRowsMax;
  for (std::int64_t panel = 0; panel < w.num_panels; panel += 2) {
    const bool two = panel + 1 < w.num_panels;
    const std::byte* data = w.data + panel * w.stride;
    const std::int64_t left = w.num_panels - panel - 2;
    Fetcher fetcher(left > 0 ? Fetch{data + 2 * w.stride, w.k * kPairBytes / 2, w.stride, left < 2 ? left : 2} : next,
                    num_chunks * w.k / 2);
    std::int64_t row = 0;
    for (std::int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const std::int64_t rows = (m - row + num_chunks - chunk - 1) / (num_chunks - chunk);
      const MultiplyRows multiply = (two ? kMultiplyRows<2> : kMultiplyRows<1>)[rows - 1];
      multiply(static_cast<const Element*>(a) + row * lda, lda, data, w.stride, w.k, c + row * ldc + panel * kPanelRows,
               ldc, accumulate, fetcher);
      row += rows;
    }
  }
}

}  // namespace
