"""Numbers of the wire that Python code names, as shm/ has them."""

# shm::AdapterTensor.
GATE_A, GATE_B, UP_A, UP_B, DOWN_A, DOWN_B = range(6)
NUM_TENSORS = 6
# shm::TensorKind.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, T = range(5)
# The group number of a tensor that a step leaves out; how many groups a step may have (shm::kNumGroupsMax).
FROZEN = 255
NUM_GROUPS_MAX = 64
# Modes of the experts op (python/src/experts_op.h).
PLAIN, RECORD, REPLAY = 0, 1, 2
