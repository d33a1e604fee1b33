#include "shm/tensor_shape.h"

#include <gtest/gtest.h>

namespace kt::shm {
namespace {

constexpr LoraSizes kBoth = {
    .hidden_size = 64, .intermediate_size = 48, .gate_up_r = 8, .shared_a = false, .down_r = 4};

TEST(TensorShape, IsRByInForAAndOutByRForB) {
  EXPECT_EQ(tensor_shape(kBoth, AdapterTensor::kGateA), (TensorShape{8, 64}));
  EXPECT_EQ(tensor_shape(kBoth, AdapterTensor::kGateB), (TensorShape{48, 8}));
  EXPECT_EQ(tensor_shape(kBoth, AdapterTensor::kUpA), (TensorShape{8, 64}));
  EXPECT_EQ(tensor_shape(kBoth, AdapterTensor::kUpB), (TensorShape{48, 8}));
  EXPECT_EQ(tensor_shape(kBoth, AdapterTensor::kDownA), (TensorShape{4, 48}));
  EXPECT_EQ(tensor_shape(kBoth, AdapterTensor::kDownB), (TensorShape{64, 4}));
}

TEST(TensorShape, OneAForGateAndUpIsTheGates) {
  LoraSizes sizes = kBoth;
  sizes.shared_a = true;
  EXPECT_EQ(tensor_shape(sizes, AdapterTensor::kGateA), (TensorShape{8, 64}));
  EXPECT_EQ(tensor_shape(sizes, AdapterTensor::kUpA), TensorShape{});
  EXPECT_EQ(tensor_shape(sizes, AdapterTensor::kUpB), (TensorShape{48, 8}));
}

TEST(TensorShape, IsEmptyWhereTheHalfIsNotAdapted) {
  LoraSizes only_down = kBoth;
  only_down.gate_up_r = 0;
  LoraSizes only_gate_up = kBoth;
  only_gate_up.down_r = 0;
  for (const AdapterTensor tensor :
       {AdapterTensor::kGateA, AdapterTensor::kGateB, AdapterTensor::kUpA, AdapterTensor::kUpB}) {
    EXPECT_EQ(tensor_shape(only_down, tensor), TensorShape{});
  }
  EXPECT_EQ(tensor_shape(only_gate_up, AdapterTensor::kDownA), TensorShape{});
  EXPECT_EQ(tensor_shape(only_gate_up, AdapterTensor::kDownB), TensorShape{});
}

TEST(TensorShape, IsEmptyForATensorThatDoesNotExist) {
  EXPECT_EQ(tensor_shape(kBoth, static_cast<AdapterTensor>(6)), TensorShape{});
}

}  // namespace
}  // namespace kt::shm
