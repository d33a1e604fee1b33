// gemm of panels, then of those that continue them, out of multiply_all of one of them: k in two calls has the bits of
// one.
#pragma once
#include "kernels/generic/panel.inl"

namespace kt::kernels::KT_TABLE {
namespace {

template <auto multiply_all>
void continued_gemm(const void* a, std::int64_t lda, std::int64_t m, const Panels& w, float* c, std::int64_t ldc,
                    bool accumulate, const Fetch& next) {
  multiply_all(a, lda, m, w, c, ldc, accumulate, next);
  if (w.more == nullptr) return;
  multiply_all(static_cast<const Element*>(a) + w.k, lda, m, *w.more, c, ldc, true, {});
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
