// kt-top's screen, read as a person would: what must be on it, and that it fits 80 × 24.
#include "tools/kt_top/view.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace {
using kt::top::render;
using nlohmann::json;

json status_with_ranks(int num_ranks, int num_jobs) {
  json status = json::parse(R"({"schema":1,"version":"0.1.0","pid":4242,"state":"serving","uptime_seconds":7265.0,
    "model":{"path":"/models/Qwen3-30B-A3B","architecture":"Qwen3MoeForCausalLM","num_layers":48,"num_experts":128,
             "top_k":8,"hidden_size":2048,"intermediate_size":768,"weight_format":"bf16"},
    "kernels":"avx512","numa_nodes":1,"worker_threads":14,
    "memory_bytes":{"weights":57123456789,"adapters":1200000000,"gradients":600000000,"optimizer":1,"activations":0,
                    "arenas":134217728},
    "rates":{"forward_tokens_per_second":12345.6,"backward_tokens_per_second":6100.0,"worker_busy_ratio":0.83,
             "tokens_per_batch":511.5},
    "totals":{"forward_requests":1234567,"backward_requests":77,"steps":120,"errors":3},"jobs":[],"ranks":[]})");
  for (int i = 0; i < num_ranks; ++i) {
    status["ranks"].push_back({{"rank", i},
                               {"pid", 1000 + i},
                               {"job_id", "job"},
                               {"state", "backward"},
                               {"in_flight", 1},
                               {"waiting_ratio", 0.42},
                               {"latency_p50_seconds", 0.00125},
                               {"latency_p99_seconds", 2.5},
                               {"totals", {{"forward_layer_tokens", 99000}}}});
  }
  for (int i = 0; i < num_jobs; ++i) {
    status["jobs"].push_back({{"job_id", "0123456789abcdef0123456789abcdef"},
                              {"name", "träining"},
                              {"state", "ok"},
                              {"world_size", 2},
                              {"members", {0, 1}},
                              {"step", 17}});
  }
  return status;
}

std::string joined(const std::vector<std::string>& lines) {
  std::string all;
  for (const std::string& line : lines) all += line + "\n";
  return all;
}

TEST(View, ShowsEverythingAPersonLooksFor) {
  const std::string screen = joined(render(status_with_ranks(2, 1), 80, 24));
  for (const char* want : {"serving", "2 h 01 min", "4242", "/models/Qwen3-30B-A3B", "48 layers × 128 experts",
                           "avx512", "workers 14", "12.3k tokens/s", "6.10k tokens/s", "83 % busy", "57.1 GB",
                           "1.23M forward", "3 errors", "träining", "42 %", "1.25 ms", "2.50 s", "99.0k", "backward"}) {
    EXPECT_NE(screen.find(want), std::string::npos) << want << " is not on\n" << screen;
  }
}

TEST(View, FitsTheTerminalWhateverItShows) {
  for (const int ranks : {0, 1, 8, 200}) {
    for (const int jobs : {0, 1, 40}) {
      const auto lines = render(status_with_ranks(ranks, jobs), 80, 24);
      EXPECT_LE(lines.size(), 24U) << ranks << " ranks, " << jobs << " jobs";
      for (const std::string& line : lines) {
        const auto width = std::count_if(line.begin(), line.end(),
                                         [](char c) { return (static_cast<unsigned char>(c) & 0xc0U) != 0x80U; });
        EXPECT_LE(width, 80) << line;
      }
    }
  }
  EXPECT_NE(joined(render(status_with_ranks(200, 40), 80, 24)).find("more"), std::string::npos);
}

TEST(View, ShowsProgressWhileLoadingAndADashForWhatIsUnknown) {
  const json loading =
      json::parse(R"({"state":"loading","pid":1,"load":{"bytes_done":25e9,"bytes_total":100e9,"seconds":10.0}})");
  const std::string screen = joined(render(loading, 80, 24));
  EXPECT_NE(screen.find("25 %"), std::string::npos) << screen;
  EXPECT_NE(screen.find("2.50 GB/s"), std::string::npos) << screen;
  EXPECT_NE(screen.find("kernels -"), std::string::npos) << screen;
}

TEST(View, FormatsUnitsAtTheirEdges) {
  EXPECT_EQ(kt::top::format_bytes(0), "0 B");
  EXPECT_EQ(kt::top::format_bytes(999), "999 B");
  EXPECT_EQ(kt::top::format_bytes(1000), "1.00 kB");
  EXPECT_EQ(kt::top::format_bytes(999.6e3), "1.00 MB");
  EXPECT_EQ(kt::top::format_count(0), "0");
  EXPECT_EQ(kt::top::format_count(12), "12");
  EXPECT_EQ(kt::top::format_count(1.5), "1.50");
  EXPECT_EQ(kt::top::format_seconds(85e-6), "85 µs");
  EXPECT_EQ(kt::top::format_seconds(1.2e-3), "1.20 ms");
  EXPECT_EQ(kt::top::format_uptime(59), "59 s");
  EXPECT_EQ(kt::top::format_uptime(250), "4 min 10 s");
}
}  // namespace
