#include "coproc/model/safetensors.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "tests/coproc/model/test_support.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/temp_dir.h"

namespace kt::coproc {
namespace {

class SafetensorsTest : public ::testing::Test {
 protected:
  Result<std::vector<TensorInfo>> read_bytes(const std::string& bytes) {
    testing::write_file(path_, bytes);
    KT_TRY(const InputFile file, InputFile::open(path_));
    return read_safetensors_header(file);
  }
  Result<std::vector<TensorInfo>> read(const std::string& header, std::size_t data_bytes) {
    return read_bytes(testing::safetensors_bytes(header, std::string(data_bytes, 'd')));
  }

  testing::TempDir dir_;
  const std::string path_ = dir_.file("x.safetensors");
};

TEST_F(SafetensorsTest, TensorsComeInTheOrderOfTheirOffsets) {
  const std::string header = R"({"b":{"data_offsets":[6,14],"shape":[2],"dtype":"F32"},)"
                             R"("__metadata__":{"format":"pt","dtype":"x"},)"
                             R"("a":{"dtype":"BF16","shape":[1,3],"data_offsets":[0,6]}}  )";
  const auto result = read(header, 14);
  ASSERT_TRUE(result.ok()) << result.error().text();
  ASSERT_EQ(result.value().size(), 2U);
  const TensorInfo& a = result.value()[0];
  EXPECT_EQ(a.name, "a");
  EXPECT_EQ(a.dtype, DType::kBf16);
  EXPECT_EQ(shape_text(a.shape), "[1,3]");
  EXPECT_EQ(a.offset, 8 + header.size());
  EXPECT_EQ(a.bytes, 6U);
  EXPECT_EQ(result.value()[1].name, "b");
  EXPECT_EQ(result.value()[1].offset, 8 + header.size() + 6);
}

TEST_F(SafetensorsTest, ScalarsEmptyTensorsSmallTypesAndEmptyFilesAreFine) {
  const auto result = read(R"({"scalar":{"dtype":"F64","shape":[],"data_offsets":[0,8]},)"
                           R"("empty":{"dtype":"F32","shape":[5,0],"data_offsets":[8,8]},)"
                           R"("fp4":{"dtype":"F4","shape":[2,3],"data_offsets":[8,11]}})",
                           11);
  ASSERT_TRUE(result.ok()) << result.error().text();
  EXPECT_EQ(result.value().size(), 3U);
  EXPECT_TRUE(read("{}", 0).ok());
}

struct BadHeader {
  const char* header;
  std::size_t data_bytes;
  std::vector<std::string> parts;
};

TEST_F(SafetensorsTest, HeadersThatLieAreRefusedWithTensorAndNumbers) {
  const std::vector<BadHeader> cases = {
      // Spans.
      {R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4, {"'t'", "[2]", "F32", "8 bytes", "[0,4]"}},
      {R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}})", 8, {"'t'", "[1]", "4 bytes", "span 8"}},
      {R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 7, {"'t'", "[0,8]", "outside", "7 bytes"}},
      {R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", 8, {"'t'", "[8,0]", "backwards"}},
      {R"({"t":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}})", 1, {"'t'", "[3]", "F4"}},
      {R"({"t":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0, {"'t'", "64 bits"}},
      {R"({"t":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}})", 0, {"'t'", "64 bits"}},
      {R"({"t":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[1,0]}})", 0, {"'t'", "64 bits"}},
      // Coverage of the file.
      {R"({"t":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})", 3, {"need 2 bytes", "has 3"}},
      {R"({"t":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})", 3, {"'t'", "begins at 1", "ends at 0"}},
      {R"({"s":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"t":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
       3,
       {"'t'", "begins at 1", "'s'", "ends at 2"}},
      {R"({"s":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
       3,
       {"'t'", "begins at 2", "'s'", "ends at 1"}},
      // Fields.
      {R"({"t":{"dtype":"F31","shape":[],"data_offsets":[0,4]}})", 4, {"'t'", "'F31'", "unknown"}},
      {R"({"t":{"dtype":"U8","shape":[1]}})", 1, {"'t'", "missing"}},
      {R"({"t":{"dtype":"U8","data_offsets":[0,1]}})", 1, {"'t'", "missing"}},
      {R"({"t":{"shape":[1],"data_offsets":[0,1]}})", 1, {"'t'", "missing"}},
      {R"({"t":{}})", 0, {"'t'", "missing"}},
      {R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"strides":[1]}})", 1, {"'t'", "'strides'"}},
      {R"({"t":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}})", 1, {"'t'", "shape", "twice"}},
      {R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1, {"'t'", "1 entries"}},
      {R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}})", 1, {"'t'", "3 entries"}},
      {R"({"t":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1, {"'t'", "negative number -1"}},
      {R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[-1,1]}})", 1, {"'t'", "negative number -1"}},
      {R"({"t":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}})", 1, {"'t'", "1.5"}},
      {R"({"t":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}})", 1, {"'t'", "1e0"}},
      {R"({"t":{"dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,1]}})",
       1,
       {"'t'", "18446744073709551616"}},
      {R"({"t":{"dtype":"U8","shape":1,"data_offsets":[0,1]}})", 1, {"'t'", "a number"}},
      {R"({"t":{"dtype":"U8","shape":[[1]],"data_offsets":[0,1]}})", 1, {"'t'", "a list"}},
      {R"({"t":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}})", 1, {"'t'", "a list"}},
      {R"({"t":{"dtype":8,"shape":[1],"data_offsets":[0,1]}})", 1, {"'t'", "a number"}},
      {R"({"t":{"dtype":"U8","shape":"1","data_offsets":[0,1]}})", 1, {"'t'", "a string"}},
      {R"({"t":{"dtype":null,"shape":[1],"data_offsets":[0,1]}})", 1, {"'t'", "null"}},
      {R"({"t":{"dtype":"U8","shape":{},"data_offsets":[0,1]}})", 1, {"'t'", "an object"}},
      {R"({"t":[]})", 0, {"'t'", "a list"}},
      {R"({"t":true})", 0, {"'t'", "a boolean"}},
      {R"({"__metadata__":{"a":1}})", 0, {"__metadata__", "a number"}},
      // Duplicates.
      {R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
       2,
       {"'t'", "twice"}},
      // JSON.
      {R"([])", 0, {"not a JSON object"}},
      {R"( {})", 0, {"not a JSON object"}},
      {"\xef\xbb\xbf{}", 0, {"not a JSON object"}},
      {"", 0, {"header of 0 bytes is not a JSON object"}},
      {R"({"t")", 0, {"not valid JSON near byte 12"}},
      {R"({} {})", 0, {"not valid JSON"}},
      {"{\"\xff\":1}", 0, {"not valid JSON"}},
  };
  for (const BadHeader& bad : cases) {
    SCOPED_TRACE(bad.header);
    const auto result = read(bad.header, bad.data_bytes);
    expect_bad_model(result, {path_});
    for (const std::string& part : bad.parts) expect_bad_model(result, {part});
  }
}

TEST_F(SafetensorsTest, AZeroByteDoesNotEndTheHeader) {
  expect_bad_model(read(std::string("{}\0garbage", 10), 0), {path_, "not a JSON object"});
}

TEST_F(SafetensorsTest, TooManyDimensionsAreRefused) {
  std::string header = R"({"t":{"dtype":"U8","shape":[1)";
  for (int i = 0; i < 32; ++i) header += ",1";
  expect_bad_model(read(header + R"(],"data_offsets":[0,1]}})", 1), {"'t'", "more than 32"});
}

TEST_F(SafetensorsTest, TheSizeOfTheHeaderIsChecked) {
  expect_bad_model(read_bytes(""), {path_, "0 bytes"});
  expect_bad_model(read_bytes("1234567"), {path_, "7 bytes"});
  const std::string good = testing::safetensors_bytes(std::string("{}"), "");
  std::string bytes = good;
  bytes[0] = 3;
  expect_bad_model(read_bytes(bytes), {path_, "header has 3 bytes", "file has 10"});
  bytes[7] = '\xff';
  expect_bad_model(read_bytes(bytes), {path_, "18374686479671623683", "100000000"});
  expect_bad_model(read_bytes(good.substr(0, 9)), {path_, "header has 2 bytes", "file has 9"});

  // A file that is really that long (sparse), to see the limit and not the size of the file.
  bytes = good;
  const std::uint64_t above = kHeaderBytesMax + 1;
  std::memcpy(bytes.data(), &above, sizeof(above));
  testing::write_file(path_, bytes);
  std::filesystem::resize_file(path_, 8 + above);
  const Result<InputFile> file = InputFile::open(path_);
  ASSERT_TRUE(file.ok());
  expect_bad_model(read_safetensors_header(file.value()), {path_, "100000001", "at most 100000000"});
}

TEST_F(SafetensorsTest, AGitLfsPointerIsRecognised) {
  expect_bad_model(read_bytes("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
                   {path_, "git-lfs pointer", "git lfs pull"});
}

TEST_F(SafetensorsTest, WhatIsNotARegularFileIsRefused) {
  expect_bad_model(InputFile::open(dir_.path().string()), {dir_.path().string(), "not a regular file"});
  expect_bad_model(InputFile::open(dir_.file("missing")), {dir_.file("missing"), "No such file"});
}

TEST_F(SafetensorsTest, AFileThatShrinksGivesAnErrorWithItsOffset) {
  testing::write_file(path_, std::string(100, 'x'));
  const Result<InputFile> file = InputFile::open(path_);
  ASSERT_TRUE(file.ok());
  std::filesystem::resize_file(path_, 60);
  char bytes[50];
  expect_bad_model(file.value().read_at(40, bytes, 50),
                   {path_, "ends at byte 60", "30 bytes more", "100 bytes when opened"});
  EXPECT_TRUE(file.value().read_at(10, bytes, 50).ok());
}

}  // namespace
}  // namespace kt::coproc
