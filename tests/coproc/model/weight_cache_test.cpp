// Real files, real processes: what is written is read back, and whatever is not whole is not used.
#include "coproc/model/weight_cache.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <vector>

#include "tests/support/checkpoint_writer.h"
#include "tests/support/temp_dir.h"

namespace kt::coproc {
namespace {

namespace fs = std::filesystem;

// Three records of this size are a chunk, and none of their borders is a page's.
constexpr std::uint64_t kRecordBytes = 5'000'001;
constexpr std::uint64_t kNumRecords = 10;
constexpr std::uint64_t kFrontBytes = 4096;
constexpr uid_t kOtherUser = 54321;

WeightCacheKey test_key(std::uint8_t number = 1) {
  WeightCacheKey key;
  for (std::size_t i = 0; i < key.digest.size(); ++i) key.digest[i] = static_cast<std::uint8_t>(number + 3 * i);
  key.file_name = "int8-" + std::to_string(number) + ".weights";
  return key;
}

// Records apart from each other, as those of several NUMA nodes are.
class Weights {
 public:
  explicit Weights(std::uint64_t count = kNumRecords, std::uint64_t bytes = kRecordBytes)
      : bytes_(bytes), records_(count, std::vector<std::byte>(bytes)) {}
  static Weights random(std::uint32_t seed, std::uint64_t count = kNumRecords, std::uint64_t bytes = kRecordBytes) {
    std::printf("  seed %u\n", seed);
    Weights weights(count, bytes);
    std::mt19937_64 generator(seed);
    for (auto& record : weights.records_) {
      for (std::uint64_t i = 0; i < bytes; i += 64) record[i] = static_cast<std::byte>(generator());
    }
    return weights;
  }
  CacheRecords records() {
    return {records_.size(), bytes_, [this](std::uint64_t index) { return records_[index].data(); }};
  }
  std::byte* record(std::uint64_t index) { return records_[index].data(); }
  bool operator==(const Weights& other) const { return records_ == other.records_; }

 private:
  std::uint64_t bytes_;
  std::vector<std::vector<std::byte>> records_;
};

class WeightCacheTest : public ::testing::Test {
 protected:
  WeightCache open(Weights& weights, const WeightCacheKey& key = test_key()) {
    Result<WeightCache> cache = WeightCache::open(path_, key, weights.records());
    EXPECT_TRUE(cache.ok()) << cache.error().text();
    return std::move(cache).value();
  }
  Status write(Weights& weights, const WeightCacheKey& key = test_key()) {
    return open(weights, key).write(std::atomic<bool>(false));
  }
  Status read(Weights& weights, std::uint32_t num_threads = 2, const WeightCacheKey& key = test_key()) {
    LoadProgress progress;
    Status status = open(weights, key).read(progress, num_threads);
    if (status.ok()) {
      EXPECT_EQ(progress.bytes_done.load(), progress.bytes_total.load());
    }
    return status;
  }
  // Refused with a reason that holds `why`, removed, and made anew as if it had never been there.
  void expect_unusable(const std::string& why) {
    Weights got;
    const Status status = read(got);
    ASSERT_FALSE(status.ok()) << why;
    EXPECT_NE(status.error().code, ErrorCode::kNotFound) << status.error().text();
    EXPECT_NE(status.error().why.find(why), std::string::npos) << status.error().text();
    EXPECT_NE(status.error().what.find(file_), std::string::npos) << status.error().text();
    EXPECT_FALSE(fs::exists(fs::symlink_status(file_)));
    const Status written = write(weights_);
    ASSERT_TRUE(written.ok()) << written.error().text();
    ASSERT_TRUE(read(got).ok());
    EXPECT_EQ(got, weights_);
  }
  void flip_bit(std::uint64_t offset, unsigned bit) const {
    const UniqueFd fd(::open(file_.c_str(), O_RDWR | O_CLOEXEC));
    unsigned char byte = 0;
    ASSERT_EQ(::pread(fd.get(), &byte, 1, static_cast<off_t>(offset)), 1);
    byte = static_cast<unsigned char>(byte ^ (1u << bit));
    ASSERT_EQ(::pwrite(fd.get(), &byte, 1, static_cast<off_t>(offset)), 1);
  }
  std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(path_)) names.push_back(entry.path().filename().string());
    return names;
  }

  testing::TempDir directory_;
  const std::string path_ = directory_.file("a/b/cache");
  const std::string file_ = path_ + "/" + test_key().file_name;
  Weights weights_ = Weights::random(7);
};

TEST_F(WeightCacheTest, WhatIsWrittenIsReadBack) {
  Weights got;
  const Status before = read(got);
  ASSERT_FALSE(before.ok());
  EXPECT_EQ(before.error().code, ErrorCode::kNotFound) << before.error().text();
  ASSERT_TRUE(write(weights_).ok());
  EXPECT_EQ(files(), std::vector{test_key().file_name});
  struct stat info {};
  ASSERT_EQ(::stat(file_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600u);
  EXPECT_EQ(info.st_size, static_cast<off_t>(kFrontBytes + kNumRecords * kRecordBytes));
  ASSERT_EQ(::stat(path_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0700u);
  for (const std::uint32_t num_threads : {0u, 1u, 3u, 50u}) {
    Weights again;
    ASSERT_TRUE(read(again, num_threads).ok());
    EXPECT_EQ(again, weights_) << num_threads << " threads";
  }
}

TEST_F(WeightCacheTest, ARecordLargerThanAChunkIsOne) {
  Weights large = Weights::random(8, 3, (20 << 20) + 1);
  ASSERT_TRUE(write(large).ok());
  Weights got(3, (20 << 20) + 1);
  ASSERT_TRUE(read(got).ok());
  EXPECT_EQ(got, large);
}

TEST_F(WeightCacheTest, AFlippedBitAnywhereIsFound) {
  ASSERT_TRUE(write(weights_).ok());
  const std::uint64_t end = kFrontBytes + kNumRecords * kRecordBytes;
  // Magic, version, size of the front, key, numbers, checksums, the front's own, its padding; then the records.
  for (const std::uint64_t offset : {0u, 8u, 12u, 20u, 50u, 58u, 66u, 72u, 135u, 136u, 151u, 152u, 4095u}) {
    SCOPED_TRACE(::testing::Message() << "byte " << offset);
    ASSERT_NO_FATAL_FAILURE(flip_bit(offset, offset % 8));
    expect_unusable(offset < 8 ? "not a file of weights" : offset < 12 ? "version" : "");
  }
  std::mt19937_64 generator(9);
  std::vector<std::uint64_t> offsets = {kFrontBytes, kFrontBytes + 3 * kRecordBytes - 1, end - 1};
  for (int i = 0; i < 8; ++i) offsets.push_back(kFrontBytes + generator() % (end - kFrontBytes));
  for (const std::uint64_t offset : offsets) {
    SCOPED_TRACE(::testing::Message() << "byte " << offset);
    ASSERT_NO_FATAL_FAILURE(flip_bit(offset, offset % 8));
    expect_unusable("do not have their checksum");
  }
}

TEST_F(WeightCacheTest, RecordsThatCouldNotBeCheckedAreZero) {
  ASSERT_TRUE(write(weights_).ok());
  flip_bit(kFrontBytes + 4 * kRecordBytes, 0);  // In the second of four chunks.
  Weights got;
  ASSERT_FALSE(read(got, 1).ok());
  const std::vector<std::byte> zeros(kRecordBytes);
  for (std::uint64_t record = 0; record < kNumRecords; ++record) {
    const std::byte* const want = record < 3 ? weights_.record(record) : zeros.data();
    EXPECT_EQ(std::memcmp(got.record(record), want, kRecordBytes), 0) << "record " << record;
  }
}

TEST_F(WeightCacheTest, ChunksThatChangedPlacesAreFound) {
  ASSERT_TRUE(write(weights_).ok());
  std::string bytes = testing::read_file(file_);
  const std::uint64_t chunk = 3 * kRecordBytes;
  std::swap_ranges(bytes.begin() + kFrontBytes, bytes.begin() + kFrontBytes + chunk,
                   bytes.begin() + kFrontBytes + chunk);
  std::ofstream(file_, std::ios::binary) << bytes;
  expect_unusable("do not have their checksum");
}

TEST_F(WeightCacheTest, AFileOfAnotherLengthIsNotUsed) {
  const std::uint64_t whole = kFrontBytes + kNumRecords * kRecordBytes;
  for (const std::uint64_t bytes : {std::uint64_t{0}, std::uint64_t{71}, kFrontBytes, whole - 1, whole + 1}) {
    ASSERT_TRUE(write(weights_).ok());
    fs::resize_file(file_, bytes);
    expect_unusable("it has " + std::to_string(bytes) + " bytes, not " + std::to_string(whole));
  }
}

TEST_F(WeightCacheTest, AFileOfAnotherKindOrKeyIsNotUsed) {
  ASSERT_TRUE(write(weights_).ok());
  std::ofstream(file_, std::ios::binary) << std::string(kFrontBytes + kNumRecords * kRecordBytes, 'x');
  expect_unusable("not a file of weights");
  Weights others = Weights::random(10);
  ASSERT_TRUE(write(others, test_key(2)).ok());
  fs::rename(path_ + "/" + test_key(2).file_name, file_);
  expect_unusable("of another checkpoint, format or layout");
}

TEST_F(WeightCacheTest, WhatOthersCanWriteIsNotUsed) {
  ASSERT_TRUE(write(weights_).ok());
  for (const mode_t mode : {0620u, 0602u}) {
    ASSERT_EQ(::chmod(file_.c_str(), mode), 0);
    expect_unusable("others can write it");
  }
  for (const mode_t mode : {0770u, 0702u}) {
    ASSERT_EQ(::chmod(path_.c_str(), mode), 0);
    const auto cache = WeightCache::open(path_, test_key(), weights_.records());
    ASSERT_FALSE(cache.ok());
    EXPECT_EQ(cache.error().code, ErrorCode::kPermission);
    EXPECT_NE(cache.error().text().find(path_), std::string::npos);
  }
  EXPECT_TRUE(fs::exists(file_)) << "nothing is removed from a directory that is not only ours";
}

TEST_F(WeightCacheTest, WhatBelongsToOthersIsNotUsed) {
  if (::geteuid() != 0) {
    const auto cache = WeightCache::open("/", test_key(), weights_.records());
    ASSERT_FALSE(cache.ok());
    EXPECT_NE(cache.error().why.find("belongs to uid 0"), std::string::npos) << cache.error().text();
    return;  // Only root can give files away.
  }
  ASSERT_TRUE(write(weights_).ok());
  ASSERT_EQ(::chown(file_.c_str(), kOtherUser, kOtherUser), 0);
  expect_unusable("belongs to uid 54321");
  ASSERT_EQ(::chown(path_.c_str(), kOtherUser, kOtherUser), 0);
  const auto cache = WeightCache::open(path_, test_key(), weights_.records());
  ASSERT_FALSE(cache.ok());
  EXPECT_NE(cache.error().why.find("belongs to uid 54321"), std::string::npos) << cache.error().text();
}

TEST_F(WeightCacheTest, LinksAndPipesAreNotFollowedNorWaitedFor) {
  ASSERT_TRUE(write(weights_).ok());
  const std::string elsewhere = directory_.file("elsewhere");
  fs::rename(file_, elsewhere);
  fs::create_symlink(elsewhere, file_);
  expect_unusable("");
  EXPECT_TRUE(fs::exists(elsewhere));
  fs::remove(file_);
  ASSERT_EQ(::mkfifo(file_.c_str(), 0600), 0);
  expect_unusable("not a regular file");
}

TEST_F(WeightCacheTest, ADirectoryInTheFilesPlaceCostsTheCacheOnly) {
  fs::create_directories(file_ + "/full");
  Weights got;
  EXPECT_FALSE(read(got).ok());
  EXPECT_FALSE(write(weights_).ok());
  EXPECT_EQ(files(), std::vector{test_key().file_name}) << "no temporary is left";
}

TEST_F(WeightCacheTest, CancellingEndsReadingAndWritingAndLeavesNothing) {
  ASSERT_TRUE(write(weights_).ok());
  LoadProgress progress;
  progress.cancel = true;
  const Status read = open(weights_).read(progress, 2);
  ASSERT_FALSE(read.ok());
  EXPECT_EQ(read.error().code, ErrorCode::kCoprocDied);
  EXPECT_TRUE(fs::exists(file_));
  fs::remove(file_);
  const Status written = open(weights_).write(progress.cancel);
  ASSERT_FALSE(written.ok());
  EXPECT_EQ(written.error().code, ErrorCode::kCoprocDied);
  EXPECT_TRUE(files().empty());
}

TEST_F(WeightCacheTest, WithoutRoomNothingIsWrittenAndNumbersSayWhy) {
  CacheRecords records = weights_.records();
  records.count = 1'000'000'000;  // 5 PB
  const auto cache = WeightCache::open(path_, test_key(), records);
  ASSERT_TRUE(cache.ok());
  const Status status = cache.value().write(std::atomic<bool>(false));
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().code, ErrorCode::kNoResources) << status.error().text();
  EXPECT_NE(status.error().why.find("5250.0 TB"), std::string::npos) << status.error().text();
  EXPECT_NE(status.error().why.find("are free"), std::string::npos) << status.error().text();
  EXPECT_TRUE(files().empty());
}

// Runs `body` in a process of its own. Its exit status, or 128 + the signal that ended it.
template <class Body>
pid_t in_child(Body body) {
  std::fflush(stdout);
  const pid_t pid = ::fork();
  if (pid == 0) ::_exit(body());
  return pid;
}
int wait_for(pid_t pid) {
  int status = 0;
  EXPECT_EQ(::waitpid(pid, &status, 0), pid);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

TEST_F(WeightCacheTest, ADiskThatRefusesBytesIsAnErrorThatLeavesNothing) {
  static_cast<void>(open(weights_));
  EXPECT_EQ(wait_for(in_child([&] {
              ::signal(SIGXFSZ, SIG_IGN);
              const rlimit limit{.rlim_cur = 20'000'000, .rlim_max = 20'000'000};
              if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) return 2;
              const Status status = write(weights_);
              return !status.ok() && status.error().why.find("File too large") != std::string::npos ? 0 : 1;
            })),
            0);
  EXPECT_TRUE(files().empty());
}

TEST_F(WeightCacheTest, AReadOnlyDirectoryIsReadAndNotWritten) {
  ASSERT_TRUE(write(weights_).ok());
  const bool root = ::geteuid() == 0;  // Whom modes do not stop.
  for (fs::path part = path_; root && part != directory_.path().parent_path(); part = part.parent_path()) {
    ASSERT_EQ(::chown(part.c_str(), kOtherUser, kOtherUser), 0);
  }
  ASSERT_TRUE(!root || ::chown(file_.c_str(), kOtherUser, kOtherUser) == 0);
  ASSERT_EQ(::chmod(path_.c_str(), 0500), 0);
  EXPECT_EQ(wait_for(in_child([&] {
              if (root && ::setuid(kOtherUser) != 0) return 2;
              Weights got;
              if (!read(got).ok() || !(got == weights_)) return 3;
              const Status status = write(weights_);
              return !status.ok() && status.error().why.find("Permission denied") != std::string::npos ? 0 : 4;
            })),
            0);
  ASSERT_EQ(::chmod(path_.c_str(), 0700), 0);
}

TEST_F(WeightCacheTest, OfTwoWritersAtOnceOneWritesAndTheOtherLeavesItToIt) {
  int ready[2];
  int go[2];
  ASSERT_EQ(::pipe(ready) | ::pipe(go), 0);
  const pid_t first = in_child([&] {
    CacheRecords records = weights_.records();
    records.place = [&, place = records.place](std::uint64_t index) {
      char byte = 0;
      if (index == 5 && (::write(ready[1], &byte, 1) != 1 || ::read(go[0], &byte, 1) != 1)) ::_exit(3);
      return place(index);
    };
    auto cache = WeightCache::open(path_, test_key(), records);
    return cache.ok() && cache.value().write(std::atomic<bool>(false)).ok() ? 0 : 1;
  });
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  // The first is in the middle of it.
  EXPECT_EQ(files(), std::vector{test_key().file_name + ".kt-tmp"});
  Weights got;
  const Status unread = read(got);
  ASSERT_FALSE(unread.ok());
  EXPECT_EQ(unread.error().code, ErrorCode::kNotFound);
  const Status second = write(weights_);
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.error().code, ErrorCode::kAlreadyRunning) << second.error().text();
  ASSERT_EQ(::write(go[1], &byte, 1), 1);
  EXPECT_EQ(wait_for(first), 0);
  for (const int fd : {ready[0], ready[1], go[0], go[1]}) ::close(fd);
  ASSERT_TRUE(read(got).ok());
  EXPECT_EQ(got, weights_);
  EXPECT_EQ(files(), std::vector{test_key().file_name});
}

TEST_F(WeightCacheTest, ManyWritersAndReadersAtOnceSeeWholeFilesOnly) {
  static_cast<void>(open(weights_));
  std::vector<pid_t> children;
  for (int child = 0; child < 6; ++child) {
    children.push_back(in_child([&] {
      for (int round = 0; round < 5; ++round) {
        const Status written = write(weights_);
        if (!written.ok() && written.error().code != ErrorCode::kAlreadyRunning) return 1;
        Weights got;
        const Status status = read(got);
        if (status.ok() ? !(got == weights_) : status.error().code != ErrorCode::kNotFound) return 2;
      }
      return 0;
    }));
  }
  for (const pid_t child : children) EXPECT_EQ(wait_for(child), 0);
  EXPECT_EQ(files(), std::vector{test_key().file_name});
}

TEST_F(WeightCacheTest, AWriterKilledAtAnyTimeLeavesNoHalfFileInUse) {
  std::mt19937 generator(11);
  int killed = 0;
  for (int round = 0; round < 12; ++round) {
    int progress[2];
    ASSERT_EQ(::pipe(progress), 0);
    const std::uint64_t last = generator() % (2 * kNumRecords);  // Each record is asked for twice at most.
    const pid_t child = in_child([&] {
      CacheRecords records = weights_.records();
      records.place = [&, place = records.place](std::uint64_t index) {
        if (index >= last) {
          const char byte = 0;
          if (::write(progress[1], &byte, 1) != 1) ::_exit(3);
          ::usleep(10'000);
        }
        return place(index);
      };
      auto cache = WeightCache::open(path_, test_key(), records);
      return cache.ok() && cache.value().write(std::atomic<bool>(false)).ok() ? 0 : 1;
    });
    ::close(progress[1]);
    char byte = 0;
    static_cast<void>(::read(progress[0], &byte, 1));  // It is at `last`, or it has ended.
    ::close(progress[0]);
    ::usleep(static_cast<useconds_t>(generator() % 10'000));
    ::kill(child, SIGKILL);
    killed += wait_for(child) == 128 + SIGKILL ? 1 : 0;
    Weights got;
    const Status status = read(got);
    if (status.ok()) {
      EXPECT_EQ(got, weights_);
      fs::remove(file_);
    } else {
      EXPECT_EQ(status.error().code, ErrorCode::kNotFound) << status.error().text();
    }
    EXPECT_TRUE(files().empty()) << "what the dead writer left is removed";
  }
  EXPECT_GT(killed, 0);
}

TEST_F(WeightCacheTest, OtherFilesOfTheDirectoryStay) {
  fs::create_directories(path_);
  fs::permissions(path_, fs::perms::owner_all);
  for (const char* const name : {"notes.tmp", "int4-2.weights"}) std::ofstream(path_ + "/" + name) << "mine";
  std::ofstream(path_ + "/int4-3.weights.kt-tmp") << "left by a dead writer";
  ASSERT_TRUE(write(weights_).ok());
  auto left = files();
  std::ranges::sort(left);
  EXPECT_EQ(left, (std::vector<std::string>{"int4-2.weights", test_key().file_name, "notes.tmp"}));
}

// Keys.

class WeightCacheKeyTest : public ::testing::Test {
 protected:
  WeightCacheKey key(const std::string& fingerprint = "f", const std::string& format = "int8",
                     const std::string& layout = "l") const {
    Result<Checkpoint> checkpoint = Checkpoint::open(written_.path);
    EXPECT_TRUE(checkpoint.ok());
    return make_weight_cache_key(checkpoint.value(), fingerprint, format, layout);
  }
  static void expect_other(const WeightCacheKey& a, const WeightCacheKey& b) {
    EXPECT_NE(a.digest, b.digest);
    EXPECT_NE(a.file_name, b.file_name);
  }

  testing::TempDir directory_;
  const testing::WrittenCheckpoint written_ = testing::write_checkpoint(directory_.path() / "m", {.num_shards = 3});
};

TEST_F(WeightCacheKeyTest, TheSameFilesHaveTheSameKeyWhereverTheyLie) {
  const WeightCacheKey before = key();
  EXPECT_EQ(key().digest, before.digest);
  EXPECT_TRUE(before.file_name.starts_with("int8-") && before.file_name.ends_with(".weights")) << before.file_name;
  fs::rename(directory_.path() / "m", directory_.path() / "moved");
  Result<Checkpoint> moved = Checkpoint::open(directory_.file("moved"));
  ASSERT_TRUE(moved.ok());
  EXPECT_EQ(make_weight_cache_key(moved.value(), "f", "int8", "l").digest, before.digest);
}

TEST_F(WeightCacheKeyTest, EveryPartCounts) {
  expect_other(key(), key("g"));
  expect_other(key(), key("f", "int4"));
  expect_other(key(), key("f", "int8", "m"));
}

TEST_F(WeightCacheKeyTest, AShardWithAnotherTimeSizeOrNameIsAnother) {
  const std::string shard = written_.path + "/model-00002-of-00003.safetensors";
  WeightCacheKey before = key();
  struct stat info {};
  ASSERT_EQ(::stat(shard.c_str(), &info), 0);
  const timespec times[] = {{0, UTIME_OMIT}, {info.st_mtim.tv_sec, (info.st_mtim.tv_nsec + 1) % 1'000'000'000}};
  ASSERT_EQ(::utimensat(AT_FDCWD, shard.c_str(), times, 0), 0);
  expect_other(before, key());

  // The same time, and a longer header: blanks are allowed behind it.
  before = key();
  ASSERT_EQ(::stat(shard.c_str(), &info), 0);
  std::string bytes = testing::read_file(shard);
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
  bytes.insert(8 + header_bytes, 8, ' ');
  header_bytes += 8;
  std::memcpy(bytes.data(), &header_bytes, sizeof header_bytes);
  testing::write_file(shard, bytes);
  const timespec same[] = {{0, UTIME_OMIT}, info.st_mtim};
  ASSERT_EQ(::utimensat(AT_FDCWD, shard.c_str(), same, 0), 0);
  expect_other(before, key());

  before = key();
  fs::rename(shard, written_.path + "/other.safetensors");
  const std::string index_path = written_.path + "/model.safetensors.index.json";
  std::string index = testing::read_file(index_path);
  const std::string name = "model-00002-of-00003.safetensors";
  for (std::size_t at = 0; (at = index.find(name, at)) != std::string::npos;) {
    index.replace(at, name.size(), "other.safetensors");
  }
  testing::write_file(index_path, index);
  expect_other(before, key());
}

}  // namespace
}  // namespace kt::coproc
