// LoRA gradients against their bit model and fp64; AdamW against values that torch.optim computed and against
// fp64.
#include <cmath>

#include "tests/kernels/kernel_suite.h"
#include "tests/support/isa/bit_model.h"

namespace kt::test {
namespace {

using kernels::AdamwArgs;

class Training : public KernelTest {
 protected:
  // `sparse`: every second panel of 32 columns of `right` counts.
  void expect_wgrad(std::int64_t m, std::int64_t r, std::int64_t n, bool scaled, bool transposed, bool sparse) {
    constexpr std::int64_t kTokens = 128;  // Of one product.
    const std::int64_t step = sparse ? 2 * kernels::kPanelRows : kernels::kPanelRows;
    Matrix left(m, r, 4, 2);
    Matrix right(m, (n + kernels::kPanelRows - 1) / kernels::kPanelRows * step, element_bytes(), 3);
    Matrix row_scale(1, m, 4);
    Matrix got(transposed ? n : r, transposed ? r : n, 4, 1);
    for (Matrix* matrix : {&left, &right, &row_scale, &got}) matrix->fill_normal(random_);
    const float scale = 0.7f;
    // Operands as gemm sees them: k is the tokens, and zeros up to what it takes.
    const std::int64_t k = (m + table().k_multiple - 1) / table().k_multiple * table().k_multiple;
    Matrix a(r, std::max<std::int64_t>(k, 1), element_bytes());
    Matrix b(n, std::max<std::int64_t>(k, 1), element_bytes());
    for (Matrix* operand : {&a, &b})
      for (std::int64_t row = 0; row < operand->num_rows(); ++row)
        for (std::int64_t token = m; token < k; ++token) operand->set(row, token, 0.0f);
    for (std::int64_t token = 0; token < m; ++token) {
      const volatile float factor = scale * (scaled ? row_scale.get(0, token) : 1.0f);
      for (std::int64_t i = 0; i < r; ++i) a.set(i, token, left.get(token, i) * factor);
      for (std::int64_t j = 0; j < n; ++j)
        b.set(j, token, right.get(token, j / kernels::kPanelRows * step + j % kernels::kPanelRows));
    }
    Matrix want(got.num_rows(), got.num_columns(), 4);
    double error = 0;
    double norm = 0;
    for (std::int64_t i = 0; i < r; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        const float before = transposed ? got.get(j, i) : got.get(i, j);
        float after = before;
        for (std::int64_t first = 0; first < k; first += kTokens) {
          const std::int64_t count = std::min(kTokens, k - first);
          const auto* from_a = a.row(i) + first * element_bytes();
          const auto* from_b = b.row(j) + first * element_bytes();
          const volatile float sum = dot_model(table(), 0.0f, from_a, from_b, count);
          after = after + sum;
        }
        want.set(transposed ? j : i, transposed ? i : j, after);
        double exact = double{before};
        for (std::int64_t token = 0; token < m; ++token) exact += double{a.get(i, token)} * double{b.get(j, token)};
        error += (exact - double{after}) * (exact - double{after});
        norm += exact * exact;
      }
    }
    table().lora_wgrad({.left = left.floats(),
                        .ld_left = left.ld(),
                        .right = right.data(),
                        .ld_right = right.ld(),
                        .panel_step = step,
                        .row_scale = scaled ? row_scale.floats() : nullptr,
                        .scale = scale,
                        .m = m,
                        .r = r,
                        .n = n,
                        .grad = got.floats(),
                        .ld_grad = got.ld(),
                        .transposed = transposed});
    EXPECT_TRUE(same_matrix(want, got)) << "m " << m << ", r " << r << ", n " << n << (transposed ? ", transposed" : "")
                                        << (sparse ? ", sparse" : "");
    EXPECT_TRUE(got.guards_are_intact());
    EXPECT_LE(error, 1e-12 * norm);
  }

  // Scalars of step t as the optimizer of the daemon computes them.
  static AdamwArgs args_of(double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                           int t, double grad_scale) {
    return {.grad_scale = static_cast<float>(grad_scale),
            .decay = static_cast<float>(decoupled ? 1.0 - lr * weight_decay : 1.0),
            .l2 = static_cast<float>(decoupled ? 0.0 : weight_decay),
            .one_minus_beta1 = static_cast<float>(1.0 - beta1),
            .beta2 = static_cast<float>(beta2),
            .one_minus_beta2 = static_cast<float>(1.0 - beta2),
            .step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, t))),
            .bias_correction2_sqrt = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, t))),
            .eps = static_cast<float>(eps)};
  }

  // Three steps over the same five values that torch was given.
  void expect_torch(bool decoupled, double beta1, double beta2, const float (&p)[5], const float (&m)[5],
                    const float (&v)[5]) {
    const float gradients[3][5] = {
        {0.1f, -0.02f, 1e-3f, 3.0f, -0.7f}, {0.3f, 0.5f, -2e-3f, 1.0f, 0.0f}, {-0.2f, 0.25f, 5e-4f, -4.0f, 0.6f}};
    float got_p[5] = {1.0f, -0.5f, 0.125f, 0.3f, -2.0f};
    float got_m[5] = {};
    float got_v[5] = {};
    for (int t = 1; t <= 3; ++t)
      table().adamw(got_p, got_m, got_v, gradients[t - 1], 5,
                    args_of(0.01, beta1, beta2, 1e-8, 0.1, decoupled, t, 1.0));
    for (int i = 0; i < 5; ++i) {
      EXPECT_NEAR(p[i], got_p[i], 1e-6f * std::fabs(p[i])) << "parameter " << i;
      EXPECT_NEAR(m[i], got_m[i], 1e-6f * std::fabs(m[i])) << "exp_avg " << i;
      EXPECT_NEAR(v[i], got_v[i], 1e-6f * std::fabs(v[i])) << "exp_avg_sq " << i;
    }
  }
};

TEST_P(Training, LoraGradientsHaveTheBitsOfTheModel) {
  for (const bool transposed : {false, true}) {
    expect_wgrad(1, 8, 32, true, transposed, false);
    expect_wgrad(3, 1, 17, false, transposed, true);
    expect_wgrad(0, 8, 16, true, transposed, false);
    if (emulated()) continue;
    expect_wgrad(40, 8, 96, true, transposed, false);
    expect_wgrad(17, 19, 70, true, transposed, true);
    expect_wgrad(33, 64, 33, false, transposed, false);
    expect_wgrad(300, 70, 64, true, transposed, true);
  }
}

// Not bit for bit: torch's own bits depend on whether its build for the CPU at hand fuses multiplications and
// additions.
TEST_P(Training, AdamwComputesWhatTorchDoes) {
  // torch 2.13 on the CPU, foreach off: three steps, lr 0.01, eps 1e-8, weight_decay 0.1; AdamW with betas (0.9,
  // 0.999), Adam with (0.4, 0.95), whose first beta makes torch.lerp work from its other end.
  expect_torch(true, 0.9, 0.999, {0x1.f3574cp-1f, -0x1.01ca02p-1f, 0x1.ea2accp-4f, 0x1.200244p-2f, -0x1.fa417p+0f},
               {0x1.eecc02p-7f, 0x1.1815ap-4f, -0x1.9b0ab8p-15f, -0x1.126e94p-4f, 0x1.b089c8p-9f},
               {0x1.255ee2p-13f, 0x1.47d622p-12f, 0x1.685d74p-28f, 0x1.a9ac4p-6f, 0x1.bd219ap-11f});
  expect_torch(false, 0.4, 0.95, {0x1.f4416ap-1f, -0x1.03d08cp-1f, 0x1.8a6642p-4f, 0x1.28736ep-2f, -0x1.fc5d64p+0f},
               {0x1.b80762p-5f, 0x1.c5c3ep-3f, 0x1.4f1a84p-7f, -0x1.d85e4ep+0f, 0x1.b5807p-4f},
               {0x1.4402bep-7f, 0x1.856b92p-7f, 0x1.38f60cp-16f, 0x1.40d8dcp+0f, 0x1.7ce7bcp-5f});
}

TEST_P(Training, AdamwMeetsFp64AndTouchesNothingElse) {
  for (const std::int64_t n : {1, 15, 16, 33, 100}) {
    for (const bool decoupled : {true, false}) {
      Matrix p(1, n, 4), m(1, n, 4), v(1, n, 4), s(1, n, 4);
      for (Matrix* matrix : {&p, &m, &v, &s}) matrix->fill_normal(random_);
      for (std::int64_t i = 0; i < n; ++i) v.set(0, i, std::fabs(v.get(0, i)) + 0.01f);
      const Matrix p0 = p, m0 = m, v0 = v;
      const AdamwArgs a = args_of(1e-2, 0.9, 0.99, 1e-6, 0.2, decoupled, 7, 0.25);
      table().adamw(p.floats(), m.floats(), v.floats(), s.floats(), n, a);
      for (std::int64_t i = 0; i < n; ++i) {
        const double decayed = double{p0.get(0, i)} * double{a.decay};
        const double g = double{s.get(0, i)} * double{a.grad_scale} + double{a.l2} * decayed;
        const double new_m = double{m0.get(0, i)} + (g - double{m0.get(0, i)}) * double{a.one_minus_beta1};
        const double new_v = double{a.beta2} * double{v0.get(0, i)} + double{a.one_minus_beta2} * g * g;
        const double step =
            double{a.step_size} * new_m / (std::sqrt(new_v) / double{a.bias_correction2_sqrt} + double{a.eps});
        EXPECT_NEAR(double{m.get(0, i)}, new_m, 1e-6);
        EXPECT_NEAR(double{v.get(0, i)}, new_v, 1e-6 * std::fabs(new_v));
        EXPECT_NEAR(double{p.get(0, i)}, decayed - step, 1e-6 * (std::fabs(decayed) + std::fabs(step)));
      }
      EXPECT_TRUE(p.guards_are_intact() && m.guards_are_intact() && v.guards_are_intact());
    }
  }
}

TEST_P(Training, AdamwResultsDoNotDependOnThePositionOfAnElement) {
  constexpr std::int64_t kElements = 53;
  Matrix p(1, kElements, 4), m(1, kElements, 4), v(1, kElements, 4), s(1, kElements, 4);
  for (Matrix* matrix : {&p, &m, &v, &s}) matrix->fill_normal(random_);
  for (std::int64_t i = 0; i < kElements; ++i) v.set(0, i, std::fabs(v.get(0, i)));
  Matrix p1 = p, m1 = m, v1 = v;
  const AdamwArgs args = args_of(1e-3, 0.9, 0.999, 1e-8, 0.01, true, 3, 0.5);
  table().adamw(p.floats(), m.floats(), v.floats(), s.floats(), kElements, args);
  for (std::int64_t i = 0; i < kElements; ++i)
    table().adamw(p1.floats() + i, m1.floats() + i, v1.floats() + i, s.floats() + i, 1, args);
  EXPECT_TRUE(same_matrix(p1, p));
  EXPECT_TRUE(same_matrix(m1, m));
  EXPECT_TRUE(same_matrix(v1, v));
}

KT_INSTANTIATE_KERNEL_TESTS(Training);

}  // namespace
}  // namespace kt::test
