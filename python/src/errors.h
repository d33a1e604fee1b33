// From Result<T> to Python exceptions: one class per error code, chosen by kt_coproc.errors.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <utility>

#include "shm/base/result.h"

namespace kt::python {

// by_code: ErrorCode value -> exception class.
void set_exceptions(std::map<int, pybind11::object> by_code, pybind11::object fallback);

// Raises the class of error.code with the three-line text. Takes the GIL itself.
[[noreturn]] void raise(const Error& error);

inline void check(const Status& status) {
  if (!status.ok()) raise(status.error());
}
template <class T>
T check(Result<T> result) {
  if (!result.ok()) raise(result.error());
  return std::move(result).value();
}

// Runs a blocking call without the GIL, whether or not the caller holds it (autograd's threads do not).
template <class F>
auto without_gil(F&& blocking) {
  if (PyGILState_Check() == 0) return blocking();
  const pybind11::gil_scoped_release release;
  return blocking();
}

}  // namespace kt::python
