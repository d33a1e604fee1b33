#include "coproc/model/progress.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <thread>

#include "shm/base/unique_fd.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/temp_dir.h"

namespace kt::coproc {
namespace {

using std::chrono::milliseconds;

class ProgressTest : public ::testing::Test {
 protected:
  std::string written() const { return testing::read_file(dir_.file("log")); }
  // Until the printer has written `text`; the test's own timeout is the watchdog.
  void wait_for(const std::string& text) const {
    while (written().find(text) == std::string::npos) std::this_thread::sleep_for(milliseconds(1));
  }

  testing::TempDir dir_;
  UniqueFd fd_{::open(dir_.file("log").c_str(), O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0600)};
  LoadProgress progress_;
};

TEST(ProgressLine, SaysBytesRateAndTimeLeft) {
  EXPECT_EQ(progress_line(12'300'000'000, 57'100'000'000, 3.6),
            "loading experts: 12.3 of 57.1 GB (21 %), 3.42 GB/s, 13 s left");
  EXPECT_EQ(progress_line(1'000'000'000, 1'342'400'000'000, 1),
            "loading experts: 1 of 1342 GB (0 %), 1 GB/s, 22 min 21 s left");
  EXPECT_EQ(progress_line(1'000'000'000, 7'204'000'000'000, 1),
            "loading experts: 1 of 7204 GB (0 %), 1 GB/s, 2 h 0 min left");
  EXPECT_EQ(progress_line(21'300'000, 21'300'000, 0.5), "loading experts: 21.3 of 21.3 MB (100 %), 0.0426 GB/s");
}

TEST(ProgressLine, HasNoRateBeforeTheFirstByte) {
  EXPECT_EQ(progress_line(0, 2'000'000'000, 1), "loading experts: 0 of 2 GB (0 %)");
  EXPECT_EQ(progress_line(0, 0, 0), "loading experts: 0 of 0 MB");
}

TEST(ProgressLine, TheSummaryHasTheMeanRate) {
  EXPECT_EQ(summary_line(57'100'000'000, 16.7), "loaded experts: 57.1 GB in 16.7 s (3.42 GB/s)");
  EXPECT_EQ(summary_line(0, 0), "loaded experts: 0 MB in 0.0 s");
}

TEST_F(ProgressTest, ALogGetsPlainLinesAndASummary) {
  progress_.bytes_total = 4'000'000'000;
  ProgressPrinter printer(progress_, fd_.get(), false, milliseconds(1));
  progress_.bytes_done = 1'000'000'000;
  wait_for("1 of 4 GB (25 %)");
  progress_.bytes_done = 4'000'000'000;
  printer.finish();
  const std::string text = written();
  EXPECT_EQ(text.find('\r'), std::string::npos);
  EXPECT_EQ(text.find('\x1b'), std::string::npos);
  EXPECT_NE(text.find("\nloaded experts: 4 GB in "), std::string::npos) << text;
  EXPECT_EQ(text.back(), '\n');
}

TEST_F(ProgressTest, ATerminalLineIsRewrittenInPlace) {
  progress_.bytes_total = 4'000'000'000;
  ProgressPrinter printer(progress_, fd_.get(), true, milliseconds(1));
  wait_for("\r\x1b[Kloading experts: 0 of 4 GB (0 %)");
  EXPECT_EQ(written().find('\n'), std::string::npos);
  progress_.bytes_done = 4'000'000'000;
  printer.finish();
  const std::string text = written();
  EXPECT_EQ(text.find('\n'), text.size() - 1);
  EXPECT_NE(text.find("\r\x1b[Kloaded experts: 4 GB"), std::string::npos) << text;
}

TEST_F(ProgressTest, AfterAFailureTheMessageStartsOnItsOwnLine) {
  {
    ProgressPrinter printer(progress_, fd_.get(), true, milliseconds(1));
    wait_for("loading");
  }
  EXPECT_EQ(written().back(), '\n');
}

TEST_F(ProgressTest, AFastLoadPrintsOnlyItsSummary) {
  progress_.bytes_total = progress_.bytes_done = 1000;
  ProgressPrinter printer(progress_, fd_.get(), false, std::chrono::hours(1));
  printer.finish();
  EXPECT_TRUE(written().starts_with("loaded experts: 0.001 MB in ")) << written();
}

TEST_F(ProgressTest, AFastFailurePrintsNothing) {
  { ProgressPrinter printer(progress_, fd_.get(), true, std::chrono::hours(1)); }
  EXPECT_EQ(written(), "");
}

}  // namespace
}  // namespace kt::coproc
