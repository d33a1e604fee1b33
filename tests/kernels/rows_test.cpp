// Kernels on rows of activations against fp64, against a bit model where one is a line long, and against the portable
// table, whose bits they share.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "tests/kernels/kernel_suite.h"
#include "tests/support/isa/bit_model.h"

namespace kt::test {
namespace {

using kernels::KernelTable;

// Column of gate j in an interleaved row; up lies 32 further.
std::int64_t gate_column(std::int64_t j) { return j / 32 * 64 + j % 32; }

struct ActivateResult {
  Matrix saved;
  Matrix z;
};

struct BackwardResult {
  Matrix grad_weight;
  Matrix z;
  Matrix grad;
};

class Rows : public KernelTest {
 protected:
  const KernelTable& portable() const { return *kernels::find_table("scalar", element_bytes(), nullptr); }
  double half_ulp() const { return element_bytes() == 2 ? std::ldexp(1.0, -8) : std::ldexp(1.0, -24); }

  // Below -88.7 e^-g is infinite in fp32 and silu becomes zero, as in torch: g·e^g < 3e-37 is lost, times u < 300.
  static constexpr double kUnderflow = 1e-34;

  // The result, in the element type, of an fp32 computation with a relative error of `computed` around `want`.
  void expect_near(double want, float got, double scale, double computed, const char* what) {
    const double allowed = (half_ulp() * 1.01) * std::fabs(want) + computed * scale + kUnderflow;
    EXPECT_LE(std::fabs(double{got} - want), allowed) << what << ": want " << want << " got " << got;
  }

  ActivateResult activate(const KernelTable& with, const Matrix& gate_up, const Activation& activation = {}) const {
    const std::int64_t i = gate_up.num_columns() / 2;
    ActivateResult result{Matrix(gate_up.num_rows(), 2 * i, element_bytes(), 2),
                          Matrix(gate_up.num_rows(), i, element_bytes(), 5)};
    with.activate({.activation = activation,
                   .m = gate_up.num_rows(),
                   .n = i,
                   .gate_up = gate_up.floats(),
                   .ld_gate_up = gate_up.ld(),
                   .saved = result.saved.data(),
                   .ld_saved = result.saved.ld(),
                   .z = result.z.data(),
                   .ld_z = result.z.ld()});
    return result;
  }

  // Without places for the results.
  static kernels::ActivateBackwardArgs backward_args(const Matrix& saved, const Matrix& p, const Matrix& weight) {
    return {.m = saved.num_rows(),
            .n = p.num_columns(),
            .saved = saved.data(),
            .ld_saved = saved.ld(),
            .p = p.floats(),
            .ld_p = p.ld(),
            .weight = weight.floats()};
  }

  BackwardResult backward(const KernelTable& with, const Matrix& saved, const Matrix& p, const Matrix& weight,
                          const Activation& activation = {}) const {
    const std::int64_t m = saved.num_rows();
    const std::int64_t i = p.num_columns();
    BackwardResult result{Matrix(i / 32, m, 4), Matrix(m, i, element_bytes(), 3), Matrix(m, 2 * i, element_bytes(), 1)};
    kernels::ActivateBackwardArgs args = backward_args(saved, p, weight);
    args.activation = activation;
    args.grad_weight = result.grad_weight.floats();
    args.ld_grad_weight = result.grad_weight.ld();
    args.z = result.z.data();
    args.ld_z = result.z.ld();
    args.grad_gate_up = result.grad.data();
    args.ld_grad = result.grad.ld();
    with.activate_backward(args);
    return result;
  }

  Matrix elements(std::int64_t rows, std::int64_t columns, float deviation) {
    Matrix m(rows, columns, element_bytes(), 1);
    m.fill_normal(random_, deviation);
    return m;
  }

  Matrix floats(std::int64_t rows, std::int64_t columns, float deviation) {
    Matrix m(rows, columns, 4, 2);
    m.fill_normal(random_, deviation);
    return m;
  }
};

TEST_P(Rows, RoundRowsRoundsTheScaledValueOnce) {
  for (const std::int64_t n : {1, 4, 17, 32, 77}) {
    for (const float scale : {1.0f, 0.3f}) {
      Matrix in(3, n, 4, 1);
      in.fill_bits(random_);
      // Exactly between two bf16, below and above, and what rounds to infinity.
      const std::uint32_t edges[] = {0x3f808000, 0x3f818000, 0x3f807fff, 0x3f808001,
                                     0x7f7fffff, 0x7f7f8000, 0x7f800001};
      for (std::int64_t c = 0; c < n && c < 7; ++c) std::memcpy(in.row(0) + c * 4, &edges[c], 4);
      Matrix got(3, n, element_bytes(), 3);
      table().round_rows(in.floats(), in.ld(), 3, n, scale, got.data(), got.ld());
      Matrix want(3, n, element_bytes());
      for (std::int64_t r = 0; r < 3; ++r)
        for (std::int64_t c = 0; c < n; ++c) want.set(r, c, in.get(r, c) * scale);
      EXPECT_TRUE(same_matrix(want, got)) << "n " << n << ", scale " << scale;
      EXPECT_TRUE(got.guards_are_intact());
    }
  }
  table().round_rows(nullptr, 0, 0, 32, 1.0f, nullptr, 0);
}

TEST_P(Rows, SumRoutesAddsInSlotOrder) {
  constexpr std::int64_t kTokens = 5;
  constexpr std::int64_t kSlots = 4;
  for (const std::int64_t n : {1, 16, 30, 64, 95}) {
    const Matrix rows = elements(7, n, 1.0f);
    const Matrix weight(floats(1, kTokens * kSlots, 1.0f));
    std::vector<std::int32_t> route(kTokens * kSlots);
    for (auto& r : route) r = std::uniform_int_distribution<std::int32_t>(-1, 6)(random_);
    for (std::size_t j = 0; j < kSlots; ++j) route[j] = -1;  // a token whose experts all live elsewhere
    for (const bool weighted : {true, false}) {
      Matrix got(kTokens, n, 4, 3);
      Matrix want(kTokens, n, 4);
      table().sum_routes({rows.data(), rows.ld(), route.data(), weighted ? weight.floats() : nullptr, kTokens, kSlots,
                          n, got.floats(), got.ld()});
      for (std::int64_t t = 0; t < kTokens; ++t) {
        for (std::int64_t c = 0; c < n; ++c) {
          volatile float sum = 0;
          for (std::int64_t j = t * kSlots; j < (t + 1) * kSlots; ++j) {
            const std::int32_t row = route[static_cast<std::size_t>(j)];
            if (row < 0) continue;
            const volatile float term = rows.get(row, c) * (weighted ? weight.get(0, j) : 1.0f);
            sum = sum + term;
          }
          want.set(t, c, sum);
        }
      }
      EXPECT_TRUE(same_matrix(want, got)) << "n " << n << (weighted ? ", weighted" : ", plain");
      EXPECT_TRUE(got.guards_are_intact());
    }
  }
}

TEST_P(Rows, SwigluMeetsFp64AndKeepsRoundedGateAndUp) {
  const std::int64_t i = emulated() ? 32 : 96;
  for (const float deviation : {1.0f, 30.0f}) {
    Matrix gate_up = floats(4, 2 * i, deviation);
    const float extremes[] = {0.0f, -0.0f, 1e-30f, -104.0f, -87.5f, 89.0f, -1e30f, 1e30f, -20.0f};
    for (std::int64_t c = 0; c < 9; ++c) gate_up.set(0, c, extremes[c]);
    const ActivateResult got = activate(table(), gate_up);
    for (std::int64_t r = 0; r < 4; ++r) {
      for (std::int64_t j = 0; j < i; ++j) {
        const double g = double{gate_up.get(r, gate_column(j))};
        const double u = double{gate_up.get(r, gate_column(j) + 32)};
        const double want = g / (1.0 + std::exp(-g)) * u;
        expect_near(want, got.z.get(r, j), std::fabs(want), 5e-7, "z");
      }
    }
    Matrix saved(4, 2 * i, element_bytes());
    for (std::int64_t r = 0; r < 4; ++r)
      for (std::int64_t c = 0; c < 2 * i; ++c) saved.set(r, c, gate_up.get(r, c));
    EXPECT_TRUE(same_matrix(saved, got.saved));
    EXPECT_TRUE(got.saved.guards_are_intact());
    EXPECT_TRUE(got.z.guards_are_intact());
    const ActivateResult reference = activate(portable(), gate_up);
    EXPECT_TRUE(same_matrix(reference.z, got.z)) << "differs from the portable table";
  }
}

TEST_P(Rows, SwigluWithoutSavingGivesTheSameBitsAndNanStaysNan) {
  Matrix gate_up = floats(2, 64, 2.0f);
  gate_up.set(0, 0, std::numeric_limits<float>::quiet_NaN());
  gate_up.set(0, 33, std::numeric_limits<float>::infinity());
  const ActivateResult with = activate(table(), gate_up);
  Matrix z(2, 32, element_bytes(), 1);
  table().activate(
      {.m = 2, .n = 32, .gate_up = gate_up.floats(), .ld_gate_up = gate_up.ld(), .z = z.data(), .ld_z = z.ld()});
  EXPECT_TRUE(same_matrix(with.z, z));
  EXPECT_TRUE(std::isnan(z.get(0, 0)));
  EXPECT_TRUE(std::isinf(z.get(0, 1)));
  EXPECT_FALSE(std::isnan(z.get(0, 2)));
}

TEST_P(Rows, SwigluBackwardMeetsFp64) {
  const std::int64_t i = emulated() ? 32 : 160;
  constexpr std::int64_t m = 5;
  Matrix saved = elements(m, 2 * i, 2.0f);
  for (std::int64_t c = 0; c < 6; ++c) saved.set(0, c, std::ldexp(c % 2 == 0 ? 1.0f : -1.0f, static_cast<int>(2 * c)));
  const Matrix p = floats(m, i, 1.0f);
  const Matrix weight = floats(1, m, 0.5f);
  const BackwardResult got = backward(table(), saved, p, weight);
  for (std::int64_t r = 0; r < m; ++r) {
    double dot = 0;
    double magnitude = 0;
    for (std::int64_t j = 0; j < i; ++j) {
      const double g = double{saved.get(r, gate_column(j))};
      const double u = double{saved.get(r, gate_column(j) + 32)};
      const double s = 1.0 / (1.0 + std::exp(-g));
      const double pz = double{p.get(r, j)} * g * s * u;
      const double dz = double{p.get(r, j)} * double{weight.get(0, r)};
      dot += pz;
      magnitude += std::fabs(pz);
      const double dg_scale = std::fabs(dz * u * s) * (1.0 + std::fabs(g) * (1.0 - s));
      expect_near(g * s * u, got.z.get(r, j), std::fabs(g * s * u), 5e-7, "z");
      // 1 - s in fp32 carries s's rounding, which counts where s is next to 1.
      expect_near(dz * u * s * (1.0 + g * (1.0 - s)), got.grad.get(r, gate_column(j)),
                  dg_scale + std::fabs(dz * u * s * g), 5e-7, "dG");
      expect_near(dz * g * s, got.grad.get(r, gate_column(j) + 32), std::fabs(dz * g * s), 5e-7, "dU");
    }
    double sum = 0;
    for (std::int64_t panel = 0; panel < i / 32; ++panel) sum += double{got.grad_weight.get(panel, r)};
    EXPECT_NEAR(sum, dot, 1e-6 * magnitude) << "row " << r;
  }
  EXPECT_TRUE(got.grad_weight.guards_are_intact());
  EXPECT_TRUE(got.z.guards_are_intact());
  EXPECT_TRUE(got.grad.guards_are_intact());
}

TEST_P(Rows, SwigluBackwardHasThePortableBitsWhateverTheCompany) {
  const Matrix saved = elements(7, 64, 2.0f);
  const Matrix p = floats(7, 32, 1.0f);
  const Matrix weight = floats(1, 7, 0.5f);
  const BackwardResult all = backward(table(), saved, p, weight);
  const BackwardResult reference = backward(portable(), saved, p, weight);
  EXPECT_TRUE(same_matrix(reference.grad_weight, all.grad_weight));
  EXPECT_TRUE(same_matrix(reference.z, all.z));
  EXPECT_TRUE(same_matrix(reference.grad, all.grad));
  for (std::int64_t r = 0; r < 7; ++r) {  // each row alone, without z
    float grad_weight = 0;
    Matrix grad(1, 64, element_bytes());
    const auto row = static_cast<std::int32_t>(r);
    kernels::ActivateBackwardArgs args = backward_args(saved, p, weight);
    args.m = 1;
    args.saved_row = &row;
    args.p += r * p.ld();
    args.weight += r;
    args.grad_weight = &grad_weight;
    args.ld_grad_weight = 1;
    args.grad_gate_up = grad.data();
    args.ld_grad = grad.ld();
    table().activate_backward(args);
    EXPECT_TRUE(same_bits(grad_weight, all.grad_weight.get(0, r)));
    for (std::int64_t c = 0; c < 64; ++c) EXPECT_TRUE(same_bits(grad.get(0, c), all.grad.get(r, c)));
  }
}

TEST_P(Rows, ActivateKeepsGateAndUpInTheRowsAskedFor) {
  const Matrix gate_up = floats(5, 64, 2.0f);
  const ActivateResult in_order = activate(table(), gate_up);
  const std::int32_t rows[] = {6, 0, 3, 8, 1};
  Matrix kept(9, 64, element_bytes(), 3);
  kept.fill_bits(random_);
  const Matrix untouched = kept;
  Matrix z(5, 32, element_bytes(), 1);
  table().activate({.m = 5,
                    .n = 32,
                    .gate_up = gate_up.floats(),
                    .ld_gate_up = gate_up.ld(),
                    .saved = kept.data(),
                    .ld_saved = kept.ld(),
                    .saved_row = rows,
                    .z = z.data(),
                    .ld_z = z.ld()});
  EXPECT_TRUE(same_matrix(in_order.z, z));
  EXPECT_TRUE(kept.guards_are_intact());
  for (std::int64_t r = 0; r < 9; ++r) {
    const auto* asked = std::find(std::begin(rows), std::end(rows), static_cast<std::int32_t>(r));
    for (std::int64_t c = 0; c < 64; ++c) {
      const float want =
          asked == std::end(rows) ? untouched.get(r, c) : in_order.saved.get(asked - std::begin(rows), c);
      EXPECT_TRUE(same_bits(want, kept.get(r, c))) << "row " << r << ", column " << c;
    }
  }
}

// 32 columns at a time, in place, are all of them: grad_weight is a sum of every 32 columns by itself.
TEST_P(Rows, SwigluBackwardOfAPartOfTheColumnsInPlaceHasTheBitsOfTheWhole) {
  Matrix gate_up = elements(3, 192, 2.0f);
  const Matrix p = floats(3, 96, 1.0f);
  const Matrix weight = floats(1, 3, 0.5f);
  const BackwardResult all = backward(table(), gate_up, p, weight);
  for (std::int64_t panel = 0; panel < 3; ++panel) {
    Matrix grad_weight(1, 3, 4);
    std::byte* part = gate_up.data() + panel * 64 * element_bytes();
    kernels::ActivateBackwardArgs args = backward_args(gate_up, p, weight);
    args.n = 32;
    args.saved = part;
    args.p += panel * 32;
    args.grad_weight = grad_weight.floats();
    args.ld_grad_weight = grad_weight.ld();
    args.grad_gate_up = part;
    args.ld_grad = gate_up.ld();
    table().activate_backward(args);
    EXPECT_TRUE(grad_weight.guards_are_intact());
    for (std::int64_t r = 0; r < 3; ++r)
      EXPECT_TRUE(same_bits(grad_weight.get(0, r), all.grad_weight.get(panel, r))) << "row " << r;
  }
  EXPECT_TRUE(same_matrix(all.grad, gate_up));
  EXPECT_TRUE(gate_up.guards_are_intact());
}

// What torch.clamp gives, and whether its gradient passes: at the limit it does, at NaN it does not.
struct Clamped {
  double value;
  bool passes;
};
Clamped clamped(float x, double low, double high) {
  if (std::isnan(x)) return {double{x}, false};
  return {std::min(std::max(double{x}, low), high), double{x} >= low && double{x} <= high};
}

// Gate and up below, at and above the limit, and NaN: each gate meets each up.
constexpr float kAroundLimit[] = {-9.0f, -2.0f, -1.0f, -0.0f, 0.5f, 2.0f, 2.015625f, 1e30f, -1e30f};
constexpr Activation kClampedAtTwo = {ActivationKind::kClampedSwiGlu, 2.0f};
void set_around_limit(Matrix& gate_up) {
  for (std::int64_t r = 0; r < 9; ++r) {
    for (std::int64_t j = 0; j < 9; ++j) {
      gate_up.set(r, j, kAroundLimit[r]);
      gate_up.set(r, j + 32, kAroundLimit[j]);
    }
  }
}

TEST_P(Rows, ClampedSwigluMeetsFp64AndHasThePortableBits) {
  Matrix gate_up = floats(9, 64, 2.0f);
  set_around_limit(gate_up);
  const ActivateResult got = activate(table(), gate_up, kClampedAtTwo);
  for (std::int64_t r = 0; r < 9; ++r) {
    for (std::int64_t j = 0; j < 32; ++j) {
      const double g = clamped(gate_up.get(r, j), -1e40, 2).value;
      const double want = g / (1.0 + std::exp(-g)) * clamped(gate_up.get(r, j + 32), -2, 2).value;
      expect_near(want, got.z.get(r, j), std::fabs(want), 5e-7, "z");
    }
  }
  EXPECT_TRUE(same_matrix(activate(table(), gate_up).saved, got.saved)) << "kept are gate and up before clamping";
  EXPECT_TRUE(same_matrix(activate(portable(), gate_up, kClampedAtTwo).z, got.z));
  EXPECT_TRUE(got.z.guards_are_intact());
}

TEST_P(Rows, ClampedSwigluBackwardHasTorchsGradientAtAndBeyondTheLimit) {
  Matrix saved = elements(9, 64, 2.0f);
  set_around_limit(saved);
  const Matrix p = floats(9, 32, 1.0f);
  const Matrix weight = floats(1, 9, 0.5f);
  const BackwardResult got = backward(table(), saved, p, weight, kClampedAtTwo);
  for (std::int64_t r = 0; r < 9; ++r) {
    double dot = 0;
    double magnitude = 0;
    for (std::int64_t j = 0; j < 32; ++j) {
      const Clamped gate = clamped(saved.get(r, j), -1e40, 2);
      const Clamped up = clamped(saved.get(r, j + 32), -2, 2);
      const double s = 1.0 / (1.0 + std::exp(-gate.value));
      const double z = gate.value * s * up.value;
      const double dz = double{p.get(r, j)} * double{weight.get(0, r)};
      const double dg = gate.passes ? dz * up.value * s * (1.0 + gate.value * (1.0 - s)) : 0;
      const double du = up.passes ? dz * gate.value * s : 0;
      dot += double{p.get(r, j)} * z;
      magnitude += std::fabs(double{p.get(r, j)} * z);
      expect_near(z, got.z.get(r, j), std::fabs(z), 5e-7, "z");
      expect_near(dg, got.grad.get(r, j), std::fabs(dz * up.value * s) * (1.0 + 2 * std::fabs(gate.value)), 5e-7, "dG");
      expect_near(du, got.grad.get(r, j + 32), std::fabs(du), 5e-7, "dU");
    }
    EXPECT_NEAR(got.grad_weight.get(0, r), dot, 1e-6 * magnitude) << "row " << r;
  }
  const BackwardResult reference = backward(portable(), saved, p, weight, kClampedAtTwo);
  EXPECT_TRUE(same_matrix(reference.grad, got.grad));
  EXPECT_TRUE(same_matrix(reference.z, got.z));
  EXPECT_TRUE(same_matrix(reference.grad_weight, got.grad_weight));
}

TEST_P(Rows, ClampedSwigluKeepsNanAndPassesItsGradientToTheOtherSideOnly) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Matrix gate_up = floats(1, 64, 1.0f);
  gate_up.set(0, 0, nan);
  gate_up.set(0, 33, nan);
  gate_up.set(0, 32, 0.5f);  // The NaN's other sides: within the limits, whatever the seed.
  gate_up.set(0, 1, 0.5f);
  const ActivateResult forward = activate(table(), gate_up, kClampedAtTwo);
  for (const std::int64_t j : {0, 1}) EXPECT_TRUE(std::isnan(forward.z.get(0, j)));
  EXPECT_FALSE(std::isnan(forward.z.get(0, 2)));
  const BackwardResult got = backward(table(), forward.saved, floats(1, 32, 1.0f), floats(1, 1, 0.5f), kClampedAtTwo);
  EXPECT_EQ(got.grad.get(0, 0), 0.0f) << "torch.clamp's gradient at NaN";
  EXPECT_TRUE(std::isnan(got.grad.get(0, 32)));
  EXPECT_TRUE(std::isnan(got.grad.get(0, 1)));
  EXPECT_EQ(got.grad.get(0, 33), 0.0f) << "torch.clamp's gradient at NaN";
}

// Nothing reaches so large a limit: the bits are those of SwiGLU.
TEST_P(Rows, ClampedSwigluFarFromItsLimitIsSwiglu) {
  const Activation far = {ActivationKind::kClampedSwiGlu, 1e30f};
  const Matrix gate_up = floats(3, 64, 2.0f);
  const ActivateResult plain = activate(table(), gate_up);
  EXPECT_TRUE(same_matrix(plain.z, activate(table(), gate_up, far).z));
  const Matrix p = floats(3, 32, 1.0f);
  const Matrix weight = floats(1, 3, 0.5f);
  const BackwardResult want = backward(table(), plain.saved, p, weight);
  const BackwardResult got = backward(table(), plain.saved, p, weight, far);
  EXPECT_TRUE(same_matrix(want.grad, got.grad));
  EXPECT_TRUE(same_matrix(want.grad_weight, got.grad_weight));
}

KT_INSTANTIATE_KERNEL_TESTS(Rows);

}  // namespace
}  // namespace kt::test
