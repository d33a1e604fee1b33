// What an expert computes of its gate and up projections, and its gradient: one struct for each ActivationKind.
//
//   value(g, u)         z = f(g, u)
//   gradient(g, u, dz)  dz·∂f/∂g and dz·∂f/∂u
//
// rows.inl walks the rows. A new activation is a kind and a row in shm/base/activation.h, and here a struct and a case.
#pragma once
#include "kernels/generic/vector.inl"
#include "shm/base/activation.h"

namespace kt::kernels::KT_TABLE {
namespace {

struct GateUp {
  F32 gate;
  F32 up;
};

struct SwiGlu {
  F32 value(F32 g, F32 u) const { return g * sigmoid(g) * u; }

  GateUp gradient(F32 g, F32 u, F32 dz) const {
    const F32 s = sigmoid(g);
    return {dz * u * s * (1.0f + g * (1.0f - s)), dz * (g * s)};
  }
};

// The rules of torch.clamp: NaN stays NaN, and the gradient passes within the limits and at them, not at NaN.
struct ClampedSwiGlu {
  float limit;

  F32 clamp_gate(F32 g) const { return g > limit ? splat(limit) : g; }
  F32 clamp_up(F32 u) const {
    const F32 raised = u < -limit ? splat(-limit) : u;
    return u > limit ? splat(limit) : raised;
  }

  F32 value(F32 g, F32 u) const { return SwiGlu{}.value(clamp_gate(g), clamp_up(u)); }

  GateUp gradient(F32 g, F32 u, F32 dz) const {
    const GateUp grad = SwiGlu{}.gradient(clamp_gate(g), clamp_up(u), dz);
    const F32 magnitude = as_f32(as_u32(u) & 0x7fffffffu);
    return {g <= limit ? grad.gate : F32{}, magnitude <= limit ? grad.up : F32{}};
  }
};

// Calls body with the struct of that kind, once for all rows: the kind is no branch in their loops.
template <typename Body>
inline void with_activation(const Activation& activation, Body body) {
  switch (activation.kind) {
    case ActivationKind::kSwiGlu:
      return body(SwiGlu{});
    case ActivationKind::kClampedSwiGlu:
      return body(ClampedSwiGlu{activation.limit});
  }
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
