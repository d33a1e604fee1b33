#include "coproc/model/input_file.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <utility>

namespace kt::coproc {

Error bad_model(std::string what, std::string why, std::string fix) {
  return Error{ErrorCode::kBadModel, std::move(what), std::move(why), std::move(fix)};
}

std::string printable(std::string_view text) {
  constexpr std::size_t kCharactersMax = 200;
  std::string out = "'";
  for (const char c : text.substr(0, kCharactersMax)) out += c >= ' ' && c <= '~' ? c : '?';
  if (text.size() > kCharactersMax) out += "…";
  return out + "'";
}

Result<InputFile> InputFile::open(const std::string& path) {
  // O_NONBLOCK: opening a FIFO must not wait for a writer.
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat info {};
  if (!fd.valid() || ::fstat(fd.get(), &info) != 0) {
    const int saved = errno;
    return bad_model("cannot open " + path,
                     std::string(std::strerror(saved)) + " (errno " + std::to_string(saved) + ")",
                     "check that the checkpoint is complete and readable, or download it again");
  }
  if (!S_ISREG(info.st_mode)) {
    return bad_model("cannot read " + path, "it is not a regular file",
                     "check that the checkpoint is complete and readable, or download it again");
  }
  const std::int64_t mtime_ns = std::int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec;
  return InputFile(path, std::move(fd), static_cast<std::uint64_t>(info.st_size), mtime_ns);
}

Status InputFile::read_at(std::uint64_t offset, void* out, std::uint64_t bytes) const {
  // One pread moves at most 2 GiB - 4 KiB on Linux.
  constexpr std::uint64_t kReadBytesMax = std::uint64_t{1} << 30;
  auto* target = static_cast<std::byte*>(out);
  std::uint64_t done = 0;
  while (done < bytes) {
    const std::uint64_t here = offset + done;
    const auto chunk = static_cast<std::size_t>(std::min(bytes - done, kReadBytesMax));
    const ssize_t got = ::pread(fd_.get(), target + done, chunk, static_cast<off_t>(here));
    if (got > 0) {
      done += static_cast<std::uint64_t>(got);
    } else if (got == 0) {
      return bad_model("cannot read " + path_,
                       "it ends at byte " + std::to_string(here) + ", " + std::to_string(bytes - done) +
                           " bytes more are needed there (it was " + std::to_string(size_) + " bytes when opened)",
                       "do not change a checkpoint while it is loaded; download or copy the file again");
    } else if (errno != EINTR) {
      const int saved = errno;
      return bad_model("cannot read " + path_,
                       "pread of " + std::to_string(chunk) + " bytes at byte " + std::to_string(here) + ": " +
                           std::strerror(saved) + " (errno " + std::to_string(saved) + ")",
                       "check the disk or the network file system (dmesg), then start again");
    }
  }
  return ok_status();
}

void InputFile::will_need(std::uint64_t offset, std::uint64_t bytes) const {
  static_cast<void>(
      ::posix_fadvise(fd_.get(), static_cast<off_t>(offset), static_cast<off_t>(bytes), POSIX_FADV_WILLNEED));
}

}  // namespace kt::coproc
