// What the tests of coproc/model share.
#pragma once
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "coproc/model/loader.h"
#include "shm/base/result.h"

namespace kt::coproc {

// An error is for a person: three lines, none empty, with the file, tensor and numbers that `parts` lists.
template <class T>
void expect_bad_model(const Result<T>& result, std::initializer_list<std::string> parts) {
  ASSERT_FALSE(result.ok());
  const Error& error = result.error();
  EXPECT_EQ(error.code, ErrorCode::kBadModel);
  EXPECT_FALSE(error.what.empty() || error.why.empty() || error.fix.empty()) << error.text();
  for (const std::string& part : parts) {
    EXPECT_NE(error.text().find(part), std::string::npos) << "no \"" << part << "\" in\n" << error.text();
  }
}

// Keeps a copy of every expert.
template <class Element>
class CollectingSink final : public ExpertSink {
 public:
  explicit CollectingSink(const ModelConfig& config)
      : elements_(std::size_t{config.intermediate_size} * config.hidden_size) {}

  void expert(std::uint32_t moe_index, std::uint32_t expert, const void* gate, const void* up,
              const void* down) override {
    std::vector<std::vector<Element>> copy;
    for (const void* matrix : {gate, up, down}) {
      copy.emplace_back(elements_);
      std::memcpy(copy.back().data(), matrix, elements_ * sizeof(Element));
    }
    const std::scoped_lock lock(mutex_);
    EXPECT_TRUE(experts.emplace(std::pair(moe_index, expert), std::move(copy)).second)
        << "expert " << expert << " of MoE layer " << moe_index << " came twice";
  }

  // (moe_index, expert) → gate, up, down.
  std::map<std::pair<std::uint32_t, std::uint32_t>, std::vector<std::vector<Element>>> experts;

 private:
  std::size_t elements_;
  std::mutex mutex_;
};

}  // namespace kt::coproc
