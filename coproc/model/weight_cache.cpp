#include "coproc/model/weight_cache.h"

#include <fcntl.h>
#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "coproc/model/sha256.h"
#include "shm/base/align.h"

namespace kt::coproc {
namespace {

constexpr std::uint32_t kFileVersion = 1;
constexpr std::uint64_t kPageBytes = 4096;
// Small enough for an even share of the file per thread, large enough for a disk to stream.
constexpr std::uint64_t kChunkBytes = 16 << 20;
// Read at once: what has been read is still in the cache when its checksum is computed.
constexpr std::uint64_t kPieceBytes = 1 << 20;

struct FileHeader {
  std::array<char, 8> magic = {'K', 'T', 'W', 'E', 'I', 'G', 'H', 'T'};
  std::uint32_t version = kFileVersion;
  std::uint32_t header_bytes = 0;  // Up to the records.
  std::array<std::uint8_t, 32> key{};
  std::uint64_t record_bytes = 0;
  std::uint64_t num_records = 0;
  std::uint64_t records_per_chunk = 0;
};
static_assert(sizeof(FileHeader) == 72 && std::has_unique_object_representations_v<FileHeader>);

using Checksum = std::array<std::uint8_t, 16>;
using Key = std::array<std::uint8_t, 32>;

// Of a chunk, or of the header: kHeaderNumber.
class Checksummer {
 public:
  static constexpr std::uint64_t kHeaderNumber = UINT64_MAX;

  static bool available() { return fetch() != nullptr; }
  Checksummer(const Key& key, std::uint64_t number) {
    const auto mac = fetch();
    KT_CHECK(mac != nullptr);
    context_.reset(EVP_MAC_CTX_new(mac.get()));
    std::string cipher = "AES-128-GCM";
    std::array<std::uint8_t, 12> iv{};
    std::memcpy(iv.data(), &number, sizeof number);
    const std::array<OSSL_PARAM, 3> parameters = {
        OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_CIPHER, cipher.data(), 0),
        OSSL_PARAM_construct_octet_string(OSSL_MAC_PARAM_IV, iv.data(), iv.size()), OSSL_PARAM_construct_end()};
    KT_CHECK(context_ != nullptr && EVP_MAC_init(context_.get(), key.data(), 16, parameters.data()) == 1);
  }
  void add(const void* bytes, std::uint64_t count) {
    KT_CHECK(EVP_MAC_update(context_.get(), static_cast<const unsigned char*>(bytes), count) == 1);
  }
  Checksum checksum() {
    Checksum out{};
    std::size_t size = 0;
    KT_CHECK(EVP_MAC_final(context_.get(), out.data(), &size, out.size()) == 1 && size == out.size());
    return out;
  }

 private:
  struct Free {
    void operator()(EVP_MAC* mac) const { EVP_MAC_free(mac); }
    void operator()(EVP_MAC_CTX* context) const { EVP_MAC_CTX_free(context); }
  };
  static std::unique_ptr<EVP_MAC, Free> fetch() {
    return std::unique_ptr<EVP_MAC, Free>(EVP_MAC_fetch(nullptr, "GMAC", nullptr));
  }
  std::unique_ptr<EVP_MAC_CTX, Free> context_;
};

// Where everything lies in the file of a key.
struct FileLayout {
  FileLayout(const WeightCacheKey& key, const CacheRecords& records) {
    header.key = key.digest;
    header.record_bytes = records.bytes;
    header.num_records = records.count;
    header.records_per_chunk = std::max<std::uint64_t>(kChunkBytes / records.bytes, 1);
    num_chunks = (records.count + header.records_per_chunk - 1) / header.records_per_chunk;
    header_bytes = round_up(sizeof(FileHeader) + (num_chunks + 1) * sizeof(Checksum), kPageBytes);
    header.header_bytes = static_cast<std::uint32_t>(header_bytes);
  }
  std::uint64_t file_bytes() const { return header_bytes + header.num_records * header.record_bytes; }
  std::uint64_t first_record(std::uint64_t chunk) const { return chunk * header.records_per_chunk; }
  std::uint64_t last_record(std::uint64_t chunk) const { return std::min(first_record(chunk + 1), header.num_records); }
  std::uint64_t offset(std::uint64_t record) const { return header_bytes + record * header.record_bytes; }

  // The bytes in front of the records.
  std::vector<std::byte> front(const std::vector<Checksum>& checksums) const {
    std::vector<std::byte> bytes(header_bytes);
    std::memcpy(bytes.data(), &header, sizeof header);
    std::memcpy(bytes.data() + sizeof header, checksums.data(), checksums.size() * sizeof(Checksum));
    const std::uint64_t covered = sizeof header + checksums.size() * sizeof(Checksum);
    Checksummer checksummer(header.key, Checksummer::kHeaderNumber);
    checksummer.add(bytes.data(), covered);
    const Checksum own = checksummer.checksum();
    std::memcpy(bytes.data() + covered, own.data(), own.size());
    return bytes;
  }

  FileHeader header;
  std::uint64_t num_chunks = 0;
  std::uint64_t header_bytes = 0;
};

Error unusable(const std::string& path, std::string why) {
  return Error{ErrorCode::kInvalidArgument, "cannot use " + path, std::move(why), "it is made anew"};
}

Error cancelled(const std::string& what, const std::string& path) {
  return Error{ErrorCode::kCoprocDied, what + " of " + path + " was cancelled", "the daemon is to stop",
               "start the daemon again"};
}

Status read_at(int fd, std::uint64_t offset, std::byte* out, std::uint64_t bytes, const std::string& path) {
  while (bytes > 0) {
    const ssize_t got = ::pread(fd, out, bytes, static_cast<off_t>(offset));
    if (got == 0) return unusable(path, "it ends at byte " + std::to_string(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return os_error("pread", path + ", at byte " + std::to_string(offset), "it is made anew");
    offset += static_cast<std::uint64_t>(got);
    out += got;
    bytes -= static_cast<std::uint64_t>(got);
  }
  return ok_status();
}

Status write_at(int fd, std::uint64_t offset, const std::byte* from, std::uint64_t bytes, const std::string& path) {
  while (bytes > 0) {
    const ssize_t put = ::pwrite(fd, from, bytes, static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) {
      return os_error("pwrite", path + ", " + std::to_string(bytes) + " bytes at byte " + std::to_string(offset),
                      "free space there, give --weight-cache another directory, or off");
    }
    offset += static_cast<std::uint64_t>(put);
    from += put;
    bytes -= static_cast<std::uint64_t>(put);
  }
  return ok_status();
}

// The chunks' checksums, from a file whose front is exactly what the key says.
Result<std::vector<Checksum>> read_front(int fd, const FileLayout& layout, const std::string& path) {
  struct stat info {};
  if (::fstat(fd, &info) != 0) return os_error("fstat", path, "it is made anew");
  if (static_cast<std::uint64_t>(info.st_size) != layout.file_bytes()) {
    return unusable(path,
                    "it has " + std::to_string(info.st_size) + " bytes, not " + std::to_string(layout.file_bytes()));
  }
  std::vector<std::byte> bytes(layout.header_bytes);
  KT_TRY_STATUS(read_at(fd, 0, bytes.data(), bytes.size(), path));
  FileHeader header;
  std::memcpy(&header, bytes.data(), sizeof header);
  if (header.magic != layout.header.magic) return unusable(path, "it is not a file of weights");
  if (header.version != kFileVersion) {
    return unusable(path, "its version is " + std::to_string(header.version) + ", not " + std::to_string(kFileVersion));
  }
  if (header.key != layout.header.key) {
    return unusable(path, "it is of another checkpoint, format or layout: its key is " + hexadecimal(header.key));
  }
  std::vector<Checksum> checksums(layout.num_chunks);
  std::memcpy(checksums.data(), bytes.data() + sizeof header, checksums.size() * sizeof(Checksum));
  if (bytes != layout.front(checksums)) return unusable(path, "its header is damaged");
  return checksums;
}

class Reader {
 public:
  Reader(int fd, const FileLayout& layout, const CacheRecords& records, std::vector<Checksum> checksums,
         LoadProgress& progress, const std::string& path)
      : fd_(fd),
        layout_(layout),
        records_(records),
        checksums_(std::move(checksums)),
        progress_(progress),
        path_(path) {}

  Status run(std::uint32_t num_threads) {
    num_threads_ = std::clamp<std::uint64_t>(num_threads, 1, layout_.num_chunks);
    {
      std::vector<std::jthread> threads;
      for (std::uint64_t i = 0; i < num_threads_; ++i) threads.emplace_back([this] { work(); });
    }
    if (error_) return std::move(*error_);
    return ok_status();
  }

 private:
  void work() {
    while (!stop_.load(std::memory_order_relaxed)) {
      const std::uint64_t chunk = next_chunk_.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= layout_.num_chunks) return;
      if (progress_.cancel.load()) return fail(cancelled("reading", path_));
      if (Status status = read(chunk); !status.ok()) {
        // Records that are packed anew keep what lies between their panels.
        for (std::uint64_t record = layout_.first_record(chunk); record < layout_.last_record(chunk); ++record) {
          std::memset(records_.place(record), 0, records_.bytes);
        }
        return fail(std::move(status).error());
      }
    }
  }

  Status read(std::uint64_t chunk) {
    // While this thread reads and checks, the disk already fetches what this round's threads read next.
    const std::uint64_t later = std::min(chunk + num_threads_, layout_.num_chunks - 1);
    const std::uint64_t later_begin = layout_.offset(layout_.first_record(later));
    const std::uint64_t later_end = layout_.offset(layout_.last_record(later));
    static_cast<void>(::posix_fadvise(fd_, static_cast<off_t>(later_begin), static_cast<off_t>(later_end - later_begin),
                                      POSIX_FADV_WILLNEED));
    Checksummer checksummer(layout_.header.key, chunk);
    for (std::uint64_t record = layout_.first_record(chunk); record < layout_.last_record(chunk); ++record) {
      std::byte* const to = records_.place(record);
      for (std::uint64_t done = 0; done < records_.bytes;) {
        const std::uint64_t piece = std::min(records_.bytes - done, kPieceBytes);
        KT_TRY_STATUS(read_at(fd_, layout_.offset(record) + done, to + done, piece, path_));
        checksummer.add(to + done, piece);
        done += piece;
        progress_.bytes_done.fetch_add(piece, std::memory_order_relaxed);
      }
    }
    if (checksummer.checksum() == checksums_[chunk]) return ok_status();
    return unusable(path_, "its bytes from " + std::to_string(layout_.offset(layout_.first_record(chunk))) + " to " +
                               std::to_string(layout_.offset(layout_.last_record(chunk))) +
                               " do not have their checksum");
  }

  // The first error counts; the other threads stop after the chunk they are at.
  void fail(Error error) {
    const std::scoped_lock lock(error_mutex_);
    if (!error_) error_ = std::move(error);
    stop_.store(true, std::memory_order_relaxed);
  }

  const int fd_;
  const FileLayout& layout_;
  const CacheRecords& records_;
  const std::vector<Checksum> checksums_;
  LoadProgress& progress_;
  const std::string& path_;
  std::uint64_t num_threads_ = 1;
  std::atomic<std::uint64_t> next_chunk_{0};
  std::atomic<bool> stop_{false};
  std::mutex error_mutex_;
  std::optional<Error> error_;
};

}  // namespace

WeightCacheKey make_weight_cache_key(const Checkpoint& checkpoint, const std::string& fingerprint,
                                     const std::string& format, const std::string& layout) {
  Sha256 hash;
  hash.add("kt-coproc weights " + std::to_string(kFileVersion) + "\n" + fingerprint + "\n" + format + "\n" + layout +
           "\n");
  for (const InputFile& file : checkpoint.files()) {
    const auto name = std::filesystem::path(file.path()).lexically_relative(checkpoint.config().path);
    hash.add(name.string() + "\t" + std::to_string(file.size()) + "\t" + std::to_string(file.mtime_ns()) + "\n");
  }
  WeightCacheKey key{.digest = hash.digest(), .file_name = ""};
  key.file_name = format + "-" + hexadecimal(key.digest) + ".weights";
  return key;
}

Result<WeightCache> WeightCache::open(const std::string& directory, WeightCacheKey key, CacheRecords records) {
  KT_CHECK(records.count > 0 && records.bytes > 0);
  if (!Checksummer::available()) {
    return Error{ErrorCode::kNoResources, "cannot check files of weights", "this OpenSSL has no GMAC",
                 "allow it in openssl.cnf, or give --weight-cache off"};
  }
  KT_TRY(CacheDirectory opened, CacheDirectory::open(directory));
  return WeightCache(std::move(opened), std::move(key), std::move(records));
}

std::uint64_t WeightCache::file_bytes() const { return FileLayout(key_, records_).file_bytes(); }

Status WeightCache::read(LoadProgress& progress, std::uint32_t num_threads) const {
  Status status = read_file(progress, num_threads);
  // Not for want of descriptors or after a failing read: the file may be good.
  const bool is_bad = !status.ok() && (status.error().code == ErrorCode::kInvalidArgument ||
                                       status.error().code == ErrorCode::kPermission);
  if (is_bad) directory_.remove_file(key_.file_name);
  return status;
}

Status WeightCache::read_file(LoadProgress& progress, std::uint32_t num_threads) const {
  KT_TRY(const UniqueFd fd, directory_.open_file(key_.file_name));
  const FileLayout layout(key_, records_);
  KT_TRY(std::vector<Checksum> checksums, read_front(fd.get(), layout, path()));
  progress.bytes_total.store(records_.count * records_.bytes);
  return Reader(fd.get(), layout, records_, std::move(checksums), progress, path()).run(num_threads);
}

Status WeightCache::write(const std::atomic<bool>& cancel) const {
  const FileLayout layout(key_, records_);
  KT_TRY(CacheDirectory::NewFile file, directory_.create_file(key_.file_name, layout.file_bytes()));
  std::vector<Checksum> checksums;
  for (std::uint64_t chunk = 0; chunk < layout.num_chunks; ++chunk) {
    if (cancel.load()) return cancelled("writing", path());
    Checksummer checksummer(layout.header.key, chunk);
    for (std::uint64_t record = layout.first_record(chunk); record < layout.last_record(chunk); ++record) {
      const std::byte* const from = records_.place(record);
      checksummer.add(from, records_.bytes);
      KT_TRY_STATUS(write_at(file.fd(), layout.offset(record), from, records_.bytes, path()));
    }
    checksums.push_back(checksummer.checksum());
    if (::fdatasync(file.fd()) != 0) return os_error("fdatasync", path(), "check the disk (dmesg)");
  }
  const std::vector<std::byte> front = layout.front(checksums);
  KT_TRY_STATUS(write_at(file.fd(), 0, front.data(), front.size(), path()));
  return file.publish();
}

}  // namespace kt::coproc
