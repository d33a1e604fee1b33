#include "coproc/daemon/control_requests.h"

#include <gtest/gtest.h>

namespace kt::coproc {
namespace {

using nlohmann::json;

// Parsed as they come: a literal 1 would be signed, which a packet's is not.
const json kCreate = json::parse(R"({"adapter": 1, "layers": [3, 1, 2],
    "gate_up": {"r": 4, "scaling": 0.5, "shared_a": true}, "down": {"r": 0}})");
const json kJoin = json::parse(R"({"job_id": "job", "name": "n", "rank": 0, "world_size": 2, "members": [0, 1]})");

json with(json body, const char* key, json value) {
  body[key] = std::move(value);
  return body;
}

TEST(ControlRequests, ReadAdapterCreateWithItsLayersInOrder) {
  const CreateAdapter create = parse_adapter_create(kCreate).value();
  EXPECT_EQ(create.adapter_id, 1u);
  EXPECT_EQ(create.layers, (std::vector<std::uint32_t>{1, 2, 3}));
  EXPECT_EQ(create.spec.gate_up, (shm::HalfSpec{4, 0.5}));
  EXPECT_TRUE(create.spec.shared_a);
  EXPECT_EQ(create.spec.down.r, 0u);
  EXPECT_TRUE(check(create).ok());
}

TEST(ControlRequests, ReadJoinWithoutATimeoutAsTheDefault) {
  const JoinJob join = parse_join(kJoin).value();
  EXPECT_EQ(join.timeout_seconds, 0);
  EXPECT_EQ(join.members, (std::vector<std::uint32_t>{0, 1}));
  EXPECT_TRUE(check(join).ok());
  EXPECT_EQ(parse_join(with(kJoin, "timeout_seconds", 1.5)).value().timeout_seconds, 1.5);
}

TEST(ControlRequests, RefuseValuesOfTheWrongTypeOrOutsideTheirField) {
  const auto malformed = [](const auto& result) {
    return !result.ok() && result.error().code == ErrorCode::kInvalidArgument;
  };
  EXPECT_TRUE(malformed(parse_adapter_create(with(kCreate, "adapter", -1))));
  EXPECT_TRUE(malformed(parse_adapter_create(with(kCreate, "adapter", std::uint64_t{1} << 32))));
  EXPECT_TRUE(malformed(parse_adapter_create(with(kCreate, "layers", json::parse("[1, 1.5]")))));
  EXPECT_TRUE(malformed(parse_adapter_create(with(kCreate, "down", json::parse(R"({"r": 4})")))));
  EXPECT_TRUE(malformed(parse_adapter_delete({{"adapter", "1"}})));
  EXPECT_TRUE(malformed(parse_join(with(kJoin, "timeout_seconds", -1))));
  EXPECT_TRUE(malformed(parse_join(with(kJoin, "members", nullptr))));
  EXPECT_TRUE(malformed(parse_stop({{"drain", 1}})));
  EXPECT_TRUE(malformed(parse_hello(json::parse(R"({"protocol": 1})"))));
}

TEST(ControlRequests, CutLabelsToTheirField) {
  const json hello = with(json::parse(R"({"protocol": 1, "arena_bytes": 4096})"), "name", std::string(100, 'x') + "\n");
  EXPECT_EQ(parse_hello(hello).value().name, std::string(63, 'x'));
}

TEST(ControlRequests, RefuseAJoinThatIsWrongByItself) {
  const auto fault = [](auto change) {
    JoinJob join{"job", "job", 0, 2, {0, 1}, 0};
    change(join);
    const Status status = check(join);
    EXPECT_EQ(status.ok() ? ErrorCode::kOk : status.error().code, ErrorCode::kInvalidArgument);
    return status.ok() ? "" : status.error().why;
  };
  const auto contains = [](const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  };
  EXPECT_TRUE(contains(fault([](JoinJob& join) { join.job_id = ""; }), "job_id has 0 bytes"));
  EXPECT_TRUE(contains(fault([](JoinJob& join) { join.members = {}; }), "members is empty"));
  EXPECT_TRUE(contains(fault([](JoinJob& join) { join.members = {0, 0}; }), "must ascend"));
  EXPECT_TRUE(contains(fault([](JoinJob& join) { join.members = {0, 5}; }), "world_size is 2"));
  EXPECT_TRUE(contains(fault([](JoinJob& join) { join.rank = 7; }), "not among its own members"));
  EXPECT_TRUE(contains(fault([](JoinJob& join) { join.timeout_seconds = -1; }), "timeout_seconds is -1"));
  EXPECT_TRUE(contains(fault([](JoinJob& join) { join.timeout_seconds = 2e8; }), "timeout_seconds is 2e+08"));
}

TEST(ControlRequests, RefuseAnAdapterThatIsWrongByItself) {
  const auto code = [](const auto& command) {
    const Status status = check(command);
    return status.ok() ? ErrorCode::kOk : status.error().code;
  };
  for (const std::uint32_t adapter_id : {0u, 65536u}) {
    EXPECT_EQ(code(CreateAdapter{adapter_id, {1}, {}}), ErrorCode::kInvalidArgument);
    EXPECT_EQ(code(DeleteAdapter{adapter_id}), ErrorCode::kInvalidArgument);
  }
  for (const auto& layers : std::vector<std::vector<std::uint32_t>>{{}, {2, 2}}) {
    EXPECT_EQ(code(CreateAdapter{1, layers, {}}), ErrorCode::kInvalidArgument);
  }
  EXPECT_EQ(code(CreateAdapter{1, {2, 3}, {}}), ErrorCode::kOk);
  EXPECT_EQ(code(DeleteAdapter{65535}), ErrorCode::kOk);
}

}  // namespace
}  // namespace kt::coproc
