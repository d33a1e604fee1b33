// A std::function that need not be copyable: it may hold what can only be moved (a segment, a descriptor, another one).
#pragma once
#include <memory>
#include <type_traits>
#include <utility>

namespace kt {

template <class Signature>
class UniqueFunction;

template <class R, class... Args>
class UniqueFunction<R(Args...)> {
 public:
  UniqueFunction() = default;
  template <class F>
  requires(!std::is_same_v<std::decay_t<F>, UniqueFunction> && std::is_invocable_r_v<R, std::decay_t<F>&, Args...>)
      UniqueFunction(F&& function)
      : held_(std::make_unique<Held<std::decay_t<F>>>(std::forward<F>(function))) {}

  explicit operator bool() const { return held_ != nullptr; }
  // Not of an empty one.
  R operator()(Args... args) { return held_->call(std::forward<Args>(args)...); }

 private:
  struct Callable {
    virtual ~Callable() = default;
    virtual R call(Args... args) = 0;
  };
  template <class F>
  struct Held final : Callable {
    template <class From>
    explicit Held(From&& from) : function(std::forward<From>(from)) {}
    R call(Args... args) override { return function(std::forward<Args>(args)...); }
    F function;
  };
  std::unique_ptr<Callable> held_;
};

}  // namespace kt
