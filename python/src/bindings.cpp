// kt_coproc._native: what _native.pyi declares. Arguments are checked here; everything else is client::Session's.
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <tuple>
#include <vector>

#include "client/session.h"
#include "python/src/errors.h"
#include "python/src/sessions.h"

namespace kt::python {
namespace {

namespace py = pybind11;

// JSON numbers, strings, lists and objects as Python's.
py::object to_python(const nlohmann::json& value) { return py::module_::import("json").attr("loads")(value.dump()); }

class PySession {
 public:
  PySession(const std::string& address, const std::string& fingerprint, const std::string& name) {
    client::ConnectOptions options;
    options.address = address;
    options.fingerprint = fingerprint;
    options.name = name;
    auto session = without_gil([&] { return client::Session::connect(options); });
    open_ = add_session(check(std::move(session)));
  }
  PySession(const PySession&) = delete;
  PySession& operator=(const PySession&) = delete;
  ~PySession() { close(); }

  void close() {
    if (!open_) return;
    without_gil([&] {
      remove_session(open_->handle);
      open_.reset();
    });
  }

  // Raises for a closed session.
  client::Session& get() const {
    if (!open_) raise_closed();
    return *open_->session;
  }
  OpenSession& open() const {
    get();
    return *open_;
  }

 private:
  std::shared_ptr<OpenSession> open_;
};

py::object model_dict(const PySession& self) {
  const client::ModelInfo& model = self.get().model();
  nlohmann::json facts = shm::to_json(model);
  facts["daemon_id"] = model.daemon_id;
  facts["daemon_pid"] = model.daemon_pid;
  facts["element_bytes"] = model.element_bytes;
  return to_python(facts);
}

void create_adapter(const PySession& self, std::uint32_t adapter, std::vector<std::uint32_t> layers,
                    std::uint32_t gate_up_r, double gate_up_scaling, bool shared_a, std::uint32_t down_r,
                    double down_scaling) {
  const client::AdapterSpec spec{std::move(layers), {gate_up_r, gate_up_scaling}, shared_a, {down_r, down_scaling}};
  check(without_gil([&] { return self.get().create_adapter(adapter, spec); }));
}

std::uint64_t join(const PySession& self, std::string job_id, std::string name, std::uint32_t rank,
                   std::uint32_t world_size, std::vector<std::uint32_t> members, double timeout_seconds) {
  const client::JoinSpec spec{std::move(job_id), std::move(name),    rank,
                              world_size,        std::move(members), timeout_seconds};
  return check(without_gil([&] { return self.get().join(spec); }));
}

// The tensor as a span, after checking that it is one.
std::span<float> floats(const at::Tensor& tensor, int kind) {
  const bool shaped = kind == static_cast<int>(shm::TensorKind::kT) ? tensor.numel() == 1 : tensor.dim() == 3;
  if (!tensor.device().is_cpu() || tensor.scalar_type() != at::kFloat || !tensor.is_contiguous() || !shaped) {
    raise({ErrorCode::kInvalidArgument, "kt_coproc: an adapter tensor must be contiguous float32 on the CPU",
           "got " + std::to_string(tensor.dim()) + " dimensions of " + c10::toString(tensor.scalar_type()),
           "pass [num_experts, rows, cols]; [1] for the step count"});
  }
  return {tensor.mutable_data_ptr<float>(), static_cast<std::size_t>(tensor.numel())};
}

client::TensorRef tensor_ref(const at::Tensor& values, int kind, std::uint32_t layer, int tensor) {
  if (kind < 0 || kind > static_cast<int>(shm::TensorKind::kT) || tensor < 0 ||
      tensor >= static_cast<int>(shm::kNumAdapterTensors)) {
    raise({ErrorCode::kInvalidArgument, "kt_coproc: no such adapter tensor",
           "kind " + std::to_string(kind) + " of 0…4, tensor " + std::to_string(tensor) + " of 0…5",
           "see kt_coproc/_native.pyi"});
  }
  const bool is_t = kind == static_cast<int>(shm::TensorKind::kT);
  return {static_cast<shm::TensorKind>(kind), layer, static_cast<shm::AdapterTensor>(tensor), 0,
          is_t ? 1 : static_cast<std::uint32_t>(values.size(0))};
}

void read(const PySession& self, std::uint32_t adapter, int kind, std::uint32_t layer, int tensor, at::Tensor out) {
  const auto span = floats(out, kind);
  const auto ref = tensor_ref(out, kind, layer, tensor);
  check(without_gil([&] { return self.get().read(adapter, ref, span); }));
}

void write(const PySession& self, std::uint32_t adapter, int kind, std::uint32_t layer, int tensor,
           const at::Tensor& values) {
  const auto span = floats(values, kind);
  const auto ref = tensor_ref(values, kind, layer, tensor);
  check(without_gil([&] { return self.get().write(adapter, ref, span); }));
}

std::vector<std::uint8_t> bytes_of(const py::bytes& bytes) {
  const std::string_view view = bytes;
  return {view.begin(), view.end()};
}

double squared_norm(const PySession& self, std::uint32_t adapter, const py::bytes& group_of) {
  const auto groups = bytes_of(group_of);
  return check(without_gil([&] { return self.get().squared_norm(adapter, groups); }));
}

void discard(const PySession& self, std::uint32_t adapter) {
  check(without_gil([&] { return self.get().discard(adapter); }));
  self.open().forget_accumulated(adapter);
}

using Group = std::tuple<double, double, double, double, double, bool>;

void step(const PySession& self, std::uint32_t adapter, double scale, const std::vector<Group>& groups,
          const py::bytes& group_of) {
  std::vector<shm::StepGroup> wire;
  for (const auto& [lr, beta1, beta2, eps, weight_decay, decoupled] : groups) {
    wire.push_back({lr, beta1, beta2, eps, weight_decay, decoupled ? 1U : 0U});
  }
  const auto bytes = bytes_of(group_of);
  check(without_gil([&] { return self.get().step(adapter, scale, wire, bytes); }));
  self.open().forget_accumulated(adapter);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "kt_coproc's extension: see _native.pyi";
  module.def("set_exceptions", &set_exceptions, py::arg("by_code"), py::arg("default"));
  py::class_<PySession>(module, "Session")
      .def(py::init<const std::string&, const std::string&, const std::string&>(), py::arg("address"),
           py::arg("fingerprint"), py::arg("name"))
      .def_property_readonly("handle", [](const PySession& self) { return self.open().handle; })
      .def_property_readonly("model", &model_dict)
      .def_property_readonly("accumulated", [](const PySession& self) { return self.open().accumulated(); })
      .def("close", &PySession::close)
      .def("create_adapter", &create_adapter, py::arg("adapter"), py::arg("layers"), py::arg("gate_up_r"),
           py::arg("gate_up_scaling"), py::arg("shared_a"), py::arg("down_r"), py::arg("down_scaling"))
      .def(
          "delete_adapter",
          [](const PySession& self, std::uint32_t adapter) {
            check(without_gil([&] { return self.get().delete_adapter(adapter); }));
            self.open().forget_accumulated(adapter);
          },
          py::arg("adapter"))
      .def("join", &join, py::arg("job_id"), py::arg("name"), py::arg("rank"), py::arg("world_size"),
           py::arg("members"), py::arg("timeout_seconds"))
      .def("read", &read, py::arg("adapter"), py::arg("kind"), py::arg("layer"), py::arg("tensor"), py::arg("out"))
      .def("write", &write, py::arg("adapter"), py::arg("kind"), py::arg("layer"), py::arg("tensor"), py::arg("values"))
      .def(
          "barrier",
          [](const PySession& self, std::uint32_t adapter) {
            check(without_gil([&] { return self.get().barrier(adapter); }));
          },
          py::arg("adapter"))
      .def("squared_norm", &squared_norm, py::arg("adapter"), py::arg("group_of"))
      .def("discard", &discard, py::arg("adapter"))
      .def("step", &step, py::arg("adapter"), py::arg("scale"), py::arg("groups"), py::arg("group_of"))
      .def("stats", [](const PySession& self) { return to_python(self.get().stats()); });
}

}  // namespace kt::python
