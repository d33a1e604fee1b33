#include "shm/text.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

namespace kt::shm {
namespace {

TEST(Text, ACutNeverSplitsACharacter) {
  EXPECT_EQ(cut_utf8("abc", 8), "abc");
  EXPECT_EQ(cut_utf8("abc", 2), "ab");
  EXPECT_EQ(cut_utf8("aé", 2), "a");  // é has 2 bytes,
  EXPECT_EQ(cut_utf8("aé", 3), "aé");
  EXPECT_EQ(cut_utf8("€€", 5), "€");  // € has 3,
  EXPECT_EQ(cut_utf8("😀😀", 7), "😀");  // 😀 has 4.
  EXPECT_EQ(cut_utf8("abc", 0), "");
  EXPECT_EQ(cut_utf8("\x80\x80\x80", 2), "");
}

TEST(Text, ValidTextIsLeftAlone) {
  const std::string text = "a é € 😀 \xF4\x8F\xBF\xBF";
  EXPECT_EQ(valid_utf8(text), text);
}

TEST(Text, EveryInvalidByteBecomesAReplacementCharacter) {
  const std::string mark = "\xEF\xBF\xBD";
  EXPECT_EQ(valid_utf8("a\xFF"
                       "b"),
            "a" + mark + "b");
  EXPECT_EQ(valid_utf8("\xC0\x80"), mark + mark);                        // Overlong.
  EXPECT_EQ(valid_utf8("\xE0\x80\x80"), mark + mark + mark);             // Overlong.
  EXPECT_EQ(valid_utf8("\xED\xA0\x80"), mark + mark + mark);             // Surrogate.
  EXPECT_EQ(valid_utf8("\xF4\x90\x80\x80"), mark + mark + mark + mark);  // Above U+10FFFF.
  EXPECT_EQ(valid_utf8("\xE2\x82"), mark + mark);                        // Ends too early.
}

TEST(Text, ControlCharactersBecomeSpaces) { EXPECT_EQ(one_line("a\nb\tc\x7F\x01 é"), "a b c   é"); }

TEST(Text, RandomBytesAlwaysBecomeTextThatJsonAccepts) {
  constexpr unsigned kSeed = 11;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  std::mt19937 random(kSeed);
  for (int i = 0; i < 2000; ++i) {
    std::string bytes(random() % 40, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random() % 4 == 0 ? random() % 128 : 0xB0 + random() % 0x50);
    const std::string text = valid_utf8(bytes);
    EXPECT_NO_THROW(static_cast<void>(nlohmann::json(text).dump()));
    EXPECT_EQ(valid_utf8(text), text);
  }
}

}  // namespace
}  // namespace kt::shm
