#include "python/src/errors.h"

namespace kt::python {
namespace {

// Never destroyed: the interpreter may be gone when static destructors run.
struct Exceptions {
  std::map<int, pybind11::object> by_code;
  pybind11::object fallback;
};
Exceptions& exceptions() {
  static auto* const kExceptions = new Exceptions;
  return *kExceptions;
}

}  // namespace

void set_exceptions(std::map<int, pybind11::object> by_code, pybind11::object fallback) {
  exceptions() = {std::move(by_code), std::move(fallback)};
}

void raise(const Error& error) {
  const pybind11::gil_scoped_acquire gil;
  const auto it = exceptions().by_code.find(static_cast<int>(error.code));
  PyObject* type = PyExc_RuntimeError;
  if (it != exceptions().by_code.end()) {
    type = it->second.ptr();
  } else if (exceptions().fallback) {
    type = exceptions().fallback.ptr();
  }
  PyErr_SetString(type, error.text().c_str());
  throw pybind11::error_already_set();
}

}  // namespace kt::python
