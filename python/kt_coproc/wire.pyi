"""Numbers of the wire, as shm/ has them (python/src/wire.cpp). An extension without torch."""

# shm::AdapterTensor, of the layout with one A for gate and up.
GATE_A: int
GATE_B: int
UP_B: int
DOWN_A: int
DOWN_B: int
NUM_TENSORS: int
# shm::TensorKind.
PARAM: int
GRAD: int
EXP_AVG: int
EXP_AVG_SQ: int
T: int
# The group number of a tensor that a step leaves out; how many groups a step may have.
FROZEN: int
NUM_GROUPS_MAX: int
# Modes of the experts op (see _native.pyi).
AUTO: int
RECORD: int
REPLAY: int
# kt::ErrorCode.
RANK_DIED: int
COPROC_DIED: int
DISAGREEMENT: int
ACTIVATION_LIMIT: int
MODEL_MISMATCH: int

def tensor_shape(
    tensor: int, hidden_size: int, intermediate_size: int, gate_up_r: int, shared_a: bool, down_r: int
) -> tuple[int, int]:
    """Rows and columns of one expert's tensor; (0, 0) where it does not exist."""
