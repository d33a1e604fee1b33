// What an expert computes between its gate and up projections and its down projection: z = f(g, u), element by element.
//
// A checkpoint's family row chooses it, the kernels compute it (kernels/generic/activation.inl), and a rank compares it
// with its module's class. A new one is a kind and a row here, and a struct with value and gradient there.
#pragma once
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kt {

// Part of the wire protocol: append only, never renumber.
enum class ActivationKind : std::uint32_t {
  kSwiGlu = 0,         // z = silu(g)·u
  kClampedSwiGlu = 1,  // z = silu(min(g, limit)) · min(max(u, -limit), limit)
};

struct ActivationRow {
  ActivationKind kind;
  std::string_view name;
  bool has_limit;  // Activation::limit is a finite number above zero; else it is zero.
};

// At index i is the kind with value i.
inline constexpr std::array kActivations = {
    ActivationRow{ActivationKind::kSwiGlu, "swiglu", false},
    ActivationRow{ActivationKind::kClampedSwiGlu, "clamped_swiglu", true},
};

struct Activation {
  ActivationKind kind = ActivationKind::kSwiGlu;
  float limit = 0;

  friend bool operator==(const Activation&, const Activation&) = default;
};

// nullptr where there is no such kind: it may have come from another process.
constexpr const ActivationRow* find_activation(ActivationKind kind) {
  const auto index = static_cast<std::size_t>(kind);
  return index < kActivations.size() ? &kActivations[index] : nullptr;
}

// nullptr where there is no such name.
constexpr const ActivationRow* find_activation(std::string_view name) {
  for (const ActivationRow& row : kActivations) {
    if (row.name == name) return &row;
  }
  return nullptr;
}

// Whether the kernels can compute it: a known kind, with a limit if and only if it has one.
inline bool is_valid(const Activation& activation) {
  const ActivationRow* row = find_activation(activation.kind);
  if (row == nullptr) return false;
  return row->has_limit ? std::isfinite(activation.limit) && activation.limit > 0 : activation.limit == 0;
}

}  // namespace kt
