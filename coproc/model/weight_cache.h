// Packed expert weights on disk, so that the next start reads them instead of quantising the checkpoint again.
//
//   byte 0   FileHeader: what the records are, and of which key
//            a checksum of 16 bytes for every chunk
//            a checksum of all the above, then zeros to a multiple of 4096
//   then     the records, one after the other; records_per_chunk of them are a chunk
//
// The key decides everything in front of the checksums, the size of the file too: whatever deviates is not used. The
// checksums are AES-GMAC, which OpenSSL computes faster than disks read on every CPU
// with AVX2. Their secret is the key, which is none: they find what disks, copies and accidents do to a file, and
// chunks that belong to another place or key. Against other users stands the directory, which only we can write.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <string>

#include "coproc/model/cache_directory.h"
#include "coproc/model/checkpoint.h"
#include "coproc/model/loader.h"
#include "shm/base/result.h"

namespace kt::coproc {

// SHA-256 over everything the packed weights follow from.
struct WeightCacheKey {
  std::array<std::uint8_t, 32> digest{};
  std::string file_name;
};
// layout: the format of the weights and all sizes of their records, as text; format begins the file's name ("int8").
// From the checkpoint come its shards' names, sizes and times: a file that is written anew has another time.
WeightCacheKey make_weight_cache_key(const Checkpoint& checkpoint, const std::string& fingerprint,
                                     const std::string& format, const std::string& layout);

// What is kept: records of one size, each where it lies in memory.
struct CacheRecords {
  std::uint64_t count = 0;
  std::uint64_t bytes = 0;                               // Of one.
  std::function<std::byte*(std::uint64_t index)> place;  // Called from several threads.
};

class WeightCache {
 public:
  // A directory that cannot be used, as CacheDirectory::open says it.
  static Result<WeightCache> open(const std::string& directory, WeightCacheKey key, CacheRecords records);

  std::string path() const { return directory_.path_of(key_.file_name); }
  std::uint64_t file_bytes() const;

  // Fills the records. kNotFound: there is no file. kCoprocDied after progress.cancel. kInvalidArgument and
  // kPermission: the file is damaged or not ours alone, and has been removed. After any error no record holds bytes
  // that have not been checked.
  Status read(LoadProgress& progress, std::uint32_t num_threads) const;

  // Writes them, whole or not at all, and at most one chunk ahead of the disk, so that memory does not fill up with
  // what waits for it. kAlreadyRunning: another process writes this file; kCoprocDied after `cancel`.
  Status write(const std::atomic<bool>& cancel) const;

 private:
  WeightCache(CacheDirectory directory, WeightCacheKey key, CacheRecords records)
      : directory_(std::move(directory)), key_(std::move(key)), records_(std::move(records)) {}
  Status read_file(LoadProgress& progress, std::uint32_t num_threads) const;

  CacheDirectory directory_;
  WeightCacheKey key_;
  CacheRecords records_;
};

}  // namespace kt::coproc
