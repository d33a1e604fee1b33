// kt_coproc.wire: the numbers of shm/ that Python code names. Without torch, so that whatever needs a number may import
// it at once; _native is loaded with the first connection.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "python/src/experts_op.h"
#include "shm/base/result.h"
#include "shm/protocol.h"
#include "shm/tensor_shape.h"

namespace kt::python {
namespace {

namespace py = pybind11;

std::pair<std::int64_t, std::int64_t> tensor_shape(std::uint32_t tensor, std::uint32_t hidden_size,
                                                   std::uint32_t intermediate_size, std::uint32_t gate_up_r,
                                                   bool shared_a, std::uint32_t down_r) {
  if (tensor >= shm::kNumAdapterTensors) throw py::value_error("no such adapter tensor");
  const shm::TensorShape shape = shm::tensor_shape({hidden_size, intermediate_size, gate_up_r, shared_a, down_r},
                                                   static_cast<shm::AdapterTensor>(tensor));
  return {shape.rows, shape.cols};
}

}  // namespace

PYBIND11_MODULE(wire, module) {
  module.doc() = "Numbers of the wire, as shm/ has them: see wire.pyi";
  const auto number = [&](const char* name, auto value) { module.attr(name) = static_cast<std::int64_t>(value); };

  number("GATE_A", shm::AdapterTensor::kGateA);
  number("GATE_B", shm::AdapterTensor::kGateB);
  number("UP_B", shm::AdapterTensor::kUpB);
  number("DOWN_A", shm::AdapterTensor::kDownA);
  number("DOWN_B", shm::AdapterTensor::kDownB);
  number("NUM_TENSORS", shm::kNumAdapterTensors);

  number("PARAM", shm::TensorKind::kParam);
  number("GRAD", shm::TensorKind::kGrad);
  number("EXP_AVG", shm::TensorKind::kExpAvg);
  number("EXP_AVG_SQ", shm::TensorKind::kExpAvgSq);
  number("T", shm::TensorKind::kT);

  number("FROZEN", shm::kFrozen);
  number("NUM_GROUPS_MAX", shm::kNumGroupsMax);

  number("AUTO", kAuto);
  number("RECORD", kRecord);
  number("REPLAY", kReplay);

  number("RANK_DIED", ErrorCode::kRankDied);
  number("COPROC_DIED", ErrorCode::kCoprocDied);
  number("DISAGREEMENT", ErrorCode::kDisagreement);
  number("ACTIVATION_LIMIT", ErrorCode::kActivationLimit);
  number("MODEL_MISMATCH", ErrorCode::kModelMismatch);

  module.def("tensor_shape", &tensor_shape, py::arg("tensor"), py::arg("hidden_size"), py::arg("intermediate_size"),
             py::arg("gate_up_r"), py::arg("shared_a"), py::arg("down_r"));
}

}  // namespace kt::python
