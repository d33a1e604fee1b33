// Seeded mutations of valid files: whatever comes of them, the reader neither crashes (AddressSanitizer and
// UndefinedBehaviorSanitizer watch) nor accepts an offset outside the file.
#include <gtest/gtest.h>

#include <cstdio>
#include <random>
#include <string>

#include "coproc/model/safetensors.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/temp_dir.h"

namespace kt::coproc {
namespace {

constexpr std::uint64_t kDataBytes = 68;

const std::string& valid_header() {
  static const std::string kHeader =
      R"({"__metadata__":{"format":"pt"},"a.weight":{"dtype":"BF16","shape":[4,6],"data_offsets":[0,48]},)"
      R"("b":{"dtype":"F32","shape":[],"data_offsets":[48,52]},)"
      R"("c":{"dtype":"F4","shape":[2,0],"data_offsets":[52,52]},)"
      R"("d\u00e9":{"dtype":"I64","shape":[2],"data_offsets":[52,68]}}   )";
  return kHeader;
}

// One to four edits: a byte changed, a piece removed or repeated, a token of the format put in.
std::string mutate(std::string text, std::mt19937& random) {
  static constexpr const char* kTokens[] = {"{",
                                            "}",
                                            "[",
                                            "]",
                                            ",",
                                            ":",
                                            "\"",
                                            "\\",
                                            "0",
                                            "-",
                                            "1e9",
                                            "null",
                                            "true",
                                            "18446744073709551615",
                                            "9223372036854775808",
                                            "\"shape\"",
                                            "\"dtype\"",
                                            "\"data_offsets\"",
                                            "\"__metadata__\"",
                                            "\xff",
                                            "\\ud800"};
  const auto below = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random); };
  for (std::size_t edits = 1 + below(4); edits > 0 && !text.empty(); --edits) {
    const std::size_t at = below(text.size());
    const std::size_t length = 1 + below(20);
    switch (below(4)) {
      case 0:
        text[at] = static_cast<char>(below(256));
        break;
      case 1:
        text.erase(at, length);
        break;
      case 2:
        text.insert(below(text.size()), text.substr(at, length));
        break;
      default:
        text.insert(at, kTokens[below(std::size(kTokens))]);
    }
  }
  return text;
}

void expect_within(const std::vector<TensorInfo>& tensors, std::uint64_t file_bytes, const std::string& input) {
  for (const TensorInfo& tensor : tensors) {
    ASSERT_LE(tensor.offset, file_bytes) << input;
    ASSERT_LE(tensor.bytes, file_bytes - tensor.offset) << input;
    std::uint64_t bits = dtype_bits(tensor.dtype);
    for (const std::uint64_t dimension : tensor.shape) bits *= dimension;
    ASSERT_EQ(bits, tensor.bytes * 8) << input;
  }
}

TEST(SafetensorsFuzz, MutatedHeadersAreRefusedOrHarmless) {
  const std::uint32_t seed = 20240607;
  std::printf("seed %u\n", seed);
  std::mt19937 random(seed);
  int accepted = 0;
  constexpr int kRounds = 15000;
  for (int round = 0; round < kRounds; ++round) {
    const std::string header = mutate(valid_header(), random);
    const std::uint64_t file_bytes = 8 + header.size() + kDataBytes;
    const auto result = parse_safetensors_header(header, file_bytes, "mutant");
    if (result.ok()) {
      ++accepted;
      expect_within(result.value(), file_bytes, header);
    } else {
      ASSERT_EQ(result.error().code, ErrorCode::kBadModel) << header;
      ASSERT_FALSE(result.error().why.empty()) << header;
    }
  }
  // Both branches were taken: names and metadata can change freely, most else cannot.
  EXPECT_GT(accepted, kRounds / 1000);
  EXPECT_LT(accepted, kRounds / 2);
}

TEST(SafetensorsFuzz, MutatedAndTruncatedFilesAreRefusedOrHarmless) {
  const std::uint32_t seed = 42;
  std::printf("seed %u\n", seed);
  std::mt19937 random(seed);
  const testing::TempDir dir;
  const std::string path = dir.file("mutant.safetensors");
  const std::string valid = testing::safetensors_bytes(valid_header(), std::string(kDataBytes, '\0'));
  for (int round = 0; round < 300; ++round) {
    std::string bytes = mutate(valid, random);
    bytes[random() % 8] ^= static_cast<char>(random() % 4 == 0 ? random() : 0);
    if (random() % 4 == 0) bytes.resize(random() % (bytes.size() + 1));
    testing::write_file(path, bytes);
    const Result<InputFile> file = InputFile::open(path);
    ASSERT_TRUE(file.ok());
    const auto result = read_safetensors_header(file.value());
    if (result.ok()) expect_within(result.value(), bytes.size(), bytes);
  }
}

}  // namespace
}  // namespace kt::coproc
