#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <set>

#include "shm/doorbell.h"
#include "shm/status_page.h"
#include "tests/shm/shm_test.h"

namespace kt::shm {
namespace {

using nlohmann::json;

std::set<std::string> keys(const json& object) {
  std::set<std::string> names;
  for (const auto& item : object.items()) names.insert(item.key());
  return names;
}
using Keys = std::set<std::string>;

// No null and nothing that is not a number, text, list or object, anywhere.
void expect_no_null(const json& value) {
  EXPECT_FALSE(value.is_null());
  if (value.is_number_float()) {
    EXPECT_TRUE(std::isfinite(value.get<double>()));
  }
  for (const json& part : value) {
    if (value.is_structured()) expect_no_null(part);
  }
}

class StatusJson : public ::testing::Test {
 protected:
  StatusJson() : owner_(std::move(StatusPageOwner::create()).value()) {}

  // A daemon in full work.
  void fill() {
    StatusPage& page = owner_.page();
    set_text(page.version, sizeof page.version, "0.1.0");
    set_text(page.daemon_id, sizeof page.daemon_id, "d-1");
    page.pid = 4711;
    page.numa_nodes = 2;
    page.worker_threads = 62;
    set_model(page, {.path = "/models/é",
                     .architecture = "Qwen3MoeForCausalLM",
                     .fingerprint = std::string(64, 'f'),
                     .weight_format = "bf16",
                     .num_layers = 48,
                     .num_experts = 128,
                     .top_k = 8,
                     .hidden_size = 2048,
                     .intermediate_size = 768,
                     .moe_layers = {0, 47},
                     .activation = {}});
    set_text(page.kernels, sizeof page.kernels, "avx512");
    page.started_ns = now_ns() - 5'000'000'000;
    page.state = DaemonState::kServing;
    page.load_bytes_done = page.load_bytes_total = 1000;
    page.load_seconds = 2.5;
    page.bytes_weights = (std::uint64_t{1} << 53) + 1;
    page.forward_tokens_per_second = 1234.5;
    page.totals.forward_requests = ~std::uint64_t{0};
    page.totals.steps = 3;
    fill_rows(page);
  }
  static void fill_rows(StatusPage& page) {
    JobRow& job = page.jobs[1];
    {
      RowWriter guard(job.version);
      job.used = 1;
      job.world_size = 4;
      job.num_members = 3;
      set_text(job.job_id, sizeof job.job_id, "j-9");
      set_text(job.name, sizeof job.name, "night run");
      set_text(job.members, sizeof job.members, "0,1,12");
    }
    job.step = 20;
    RankRow& rank = page.ranks[200];
    {
      RowWriter guard(rank.version);
      rank.used = 1;
      rank.rank = 12;
      rank.pid = 99;
      set_text(rank.job_id, sizeof rank.job_id, "j-9");
    }
    rank.state = static_cast<std::uint32_t>(RankState::kBackward);
    rank.in_flight = 2;
    rank.waiting_ratio = 0.25;
    rank.totals.fetch_requests = 6;
    record_latency(rank.latency, 1'000'000);
  }
  StatusPageOwner owner_;
};

TEST_F(StatusJson, AFreshPageIsADaemonThatLoadsAndKnowsNothing) {
  const json status = status_json(owner_.page());
  expect_no_null(status);
  EXPECT_EQ(keys(status),
            (Keys{"schema", "state", "load", "model", "memory_bytes", "jobs", "ranks", "rates", "totals"}));
  EXPECT_EQ(status["schema"], 1);
  EXPECT_EQ(status["state"], "loading");
  EXPECT_EQ(status["model"], json::object());
  EXPECT_EQ(status["jobs"], json::array());
  EXPECT_EQ(status["ranks"], json::array());
  EXPECT_EQ(keys(status["load"]), (Keys{"bytes_done", "seconds"}));
}

TEST_F(StatusJson, APageOfZerosIsTheSame) {
  const auto zeros = std::make_unique<StatusPage>();
  std::memset(reinterpret_cast<void*>(zeros.get()), 0, sizeof(StatusPage));
  EXPECT_EQ(status_json(*zeros), status_json(owner_.page()));
}

TEST_F(StatusJson, ADaemonAtWorkHasExactlyTheKeysOfTheContract) {
  fill();
  const json status = status_json(owner_.page());
  expect_no_null(status);
  EXPECT_EQ(keys(status),
            (Keys{"schema", "version", "pid", "daemon_id", "state", "uptime_seconds", "load", "model", "kernels",
                  "numa_nodes", "worker_threads", "memory_bytes", "jobs", "ranks", "rates", "totals"}));
  EXPECT_EQ(keys(status["load"]), (Keys{"bytes_done", "bytes_total", "seconds"}));
  EXPECT_EQ(keys(status["model"]), (Keys{"path", "architecture", "fingerprint", "num_layers", "num_experts", "top_k",
                                         "hidden_size", "intermediate_size", "activation", "weight_format"}));
  EXPECT_EQ(keys(status["memory_bytes"]),
            (Keys{"weights", "adapters", "gradients", "optimizer", "activations", "arenas"}));
  EXPECT_EQ(keys(status["rates"]),
            (Keys{"forward_tokens_per_second", "backward_tokens_per_second", "worker_busy_ratio", "tokens_per_batch"}));
  EXPECT_EQ(keys(status["totals"]),
            (Keys{"forward_requests", "backward_requests", "fetch_requests", "forward_layer_tokens",
                  "backward_layer_tokens", "steps", "batches", "errors", "sessions_attached", "sessions_rejected"}));
  ASSERT_EQ(status["jobs"].size(), 1u);
  EXPECT_EQ(status["jobs"][0], (json{{"job_id", "j-9"},
                                     {"name", "night run"},
                                     {"state", "ok"},
                                     {"world_size", 4},
                                     {"members", {0, 1, 12}},
                                     {"step", 20}}));
  ASSERT_EQ(status["ranks"].size(), 1u);
  const json& rank = status["ranks"][0];
  EXPECT_EQ(keys(rank), (Keys{"rank", "pid", "job_id", "state", "in_flight", "totals", "latency_p50_seconds",
                              "latency_p99_seconds", "waiting_ratio"}));
  EXPECT_EQ(keys(rank["totals"]), (Keys{"forward_requests", "backward_requests", "fetch_requests",
                                        "forward_layer_tokens", "backward_layer_tokens", "errors"}));
}

TEST_F(StatusJson, APathTooLongForThePageIsCutAndHidesNoOtherFact) {
  fill();
  ModelCard card = {.path = "/" + std::string(4095, '\x01'),  // Six bytes each in JSON.
                    .architecture = "Qwen3MoeForCausalLM",
                    .fingerprint = "",
                    .weight_format = "bf16",
                    .num_layers = 2,
                    .num_experts = 8,
                    .top_k = 2,
                    .hidden_size = 64,
                    .intermediate_size = 32,
                    .moe_layers = {0, 1},
                    .activation = {}};
  set_model(owner_.page(), card);
  const nlohmann::json model = status_json(owner_.page())["model"];
  EXPECT_EQ(model.value("num_experts", 0), 8);
  EXPECT_EQ(model.value("path", "").rfind("/\x01", 0), 0U);
}

TEST_F(StatusJson, NumbersAreExactAndTextsAreThemselves) {
  fill();
  const json status = status_json(owner_.page());
  EXPECT_EQ(status["totals"]["forward_requests"].get<std::uint64_t>(), ~std::uint64_t{0});
  EXPECT_EQ(status["memory_bytes"]["weights"].get<std::uint64_t>(), (std::uint64_t{1} << 53) + 1);
  EXPECT_EQ(status["state"], "serving");
  EXPECT_EQ(status["model"]["path"], "/models/é");
  EXPECT_EQ(status["model"]["fingerprint"], std::string(64, 'f'));
  EXPECT_GE(status["uptime_seconds"].get<double>(), 5.0);
  EXPECT_EQ(status["ranks"][0]["state"], "backward");
  EXPECT_EQ(status["ranks"][0]["in_flight"], 2);
  EXPECT_NEAR(status["ranks"][0]["latency_p50_seconds"].get<double>(), 1e-3, 5e-5);
}

TEST_F(StatusJson, AFailedJobSaysSo) {
  fill();
  owner_.page().jobs[1].failed = 1;
  EXPECT_EQ(status_json(owner_.page())["jobs"][0]["state"], "failed");
}

TEST_F(StatusJson, WhatIsUnknownIsAbsentAndNeverNull) {
  fill();
  StatusPage& page = owner_.page();
  for (auto& count : page.ranks[200].latency.counts) count = 0;
  page.ranks[200].waiting_ratio = std::numeric_limits<double>::quiet_NaN();
  page.worker_busy_ratio = std::numeric_limits<double>::infinity();
  set_text(page.jobs[1].name, sizeof page.jobs[1].name, "");
  const json status = status_json(page);
  expect_no_null(status);
  EXPECT_EQ(keys(status["ranks"][0]), (Keys{"rank", "pid", "job_id", "state", "in_flight", "totals"}));
  EXPECT_FALSE(status["rates"].contains("worker_busy_ratio"));
  EXPECT_FALSE(status["jobs"][0].contains("name"));
}

TEST_F(StatusJson, ARowThatIsBeingWrittenForEverIsLeftOut) {
  fill();
  owner_.page().ranks[200].version.fetch_add(1);
  EXPECT_EQ(status_json(owner_.page())["ranks"], json::array());
}

TEST_F(StatusJson, ACutListOfMembersShowsNoHalfNumber) {
  fill();
  JobRow& job = owner_.page().jobs[1];
  std::string members;
  for (int rank = 1000; rank < 1100; ++rank) members += (rank == 1000 ? "" : ",") + std::to_string(rank);
  job.num_members = 100;
  set_text(job.members, sizeof job.members, members);
  const json shown = status_json(owner_.page())["jobs"][0]["members"];
  EXPECT_GE(shown.size(), 50u);
  for (std::size_t i = 0; i < shown.size(); ++i) EXPECT_EQ(shown[i], 1000 + i);
}

TEST_F(StatusJson, APageOfRandomBytesIsStillAnObjectOfValidText) {
  constexpr unsigned kSeed = 99;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  std::mt19937_64 random(kSeed);
  const auto page = std::make_unique<StatusPage>();
  auto* const words = reinterpret_cast<std::uint64_t*>(page.get());
  for (int round = 0; round < 3; ++round) {
    for (std::size_t i = 0; i < sizeof(StatusPage) / 8; ++i) words[i] = random() | 0x0101010101010101u;
    // Even versions, so that the rows are read.
    for (auto& row : page->jobs) row.version = 2;
    for (auto& row : page->ranks) row.version = 2;
    const json status = status_json(*page);
    expect_no_null(status);
    EXPECT_EQ(status["jobs"].size(), kNumJobRowsMax);
    EXPECT_EQ(status["ranks"].size(), kNumRankRowsMax);
    EXPECT_EQ(status["state"], "unknown");
    EXPECT_NO_THROW(static_cast<void>(status.dump()));
  }
}

}  // namespace
}  // namespace kt::shm
