// A regular file of a checkpoint, read with pread, and the words for what can be wrong with it.
//
// Not mmap'ed: a file that another process truncates while we read it must give an error, not SIGBUS.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "shm/base/result.h"
#include "shm/base/unique_fd.h"

namespace kt::coproc {

// kBadModel: the checkpoint cannot be served.
Error bad_model(std::string what, std::string why, std::string fix);

// Text from a file (a tensor name, a key) as it may appear in an error message: in quotes, without control or
// non-ASCII characters, at most 200 characters.
std::string printable(std::string_view text);

class InputFile {
 public:
  // Opens a regular file (symbolic links are followed: the Hugging Face cache consists of them). Anything else, also
  // a file that is not there, is kBadModel.
  static Result<InputFile> open(const std::string& path);

  // Reads exactly `bytes` bytes from `offset`. A read error or a file that ends before: kBadModel naming file and
  // offset. Safe from several threads.
  Status read_at(std::uint64_t offset, void* out, std::uint64_t bytes) const;
  // Asks the kernel to read ahead. Only advice: nothing fails.
  void will_need(std::uint64_t offset, std::uint64_t bytes) const;

  const std::string& path() const { return path_; }
  // Bytes when the file was opened.
  std::uint64_t size() const { return size_; }
  // Nanoseconds since 1970, when the file was opened.
  std::int64_t mtime_ns() const { return mtime_ns_; }

 private:
  InputFile(std::string path, UniqueFd fd, std::uint64_t size, std::int64_t mtime_ns)
      : path_(std::move(path)), fd_(std::move(fd)), size_(size), mtime_ns_(mtime_ns) {}

  std::string path_;
  UniqueFd fd_;
  std::uint64_t size_ = 0;
  std::int64_t mtime_ns_ = 0;
};

}  // namespace kt::coproc
