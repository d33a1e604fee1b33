#include "coproc/model/cache_directory.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <filesystem>
#include <memory>
#include <string_view>
#include <utility>

#include "coproc/machine/memory_room.h"

namespace kt::coproc {
namespace {

constexpr std::string_view kTemporaryEnd = ".kt-tmp";  // No other program's: they are removed.
constexpr std::uint64_t kSpareShare = 20;              // A twentieth of a file is to stay free beside it.
constexpr const char* kFix = "give --weight-cache a directory of your own, or off";

// Empty: only this user can write it.
std::string unsafe(const struct stat& info) {
  if (info.st_uid != ::geteuid()) {
    return "it belongs to uid " + std::to_string(info.st_uid) + ", this process runs as uid " +
           std::to_string(::geteuid());
  }
  if ((info.st_mode & (S_IWGRP | S_IWOTH)) == 0) return "";
  char mode[8];
  std::snprintf(mode, sizeof mode, "%04o", info.st_mode & 07777u);
  return std::string("its mode is ") + mode + ": others can write it";
}

Status make_directories(const std::string& path) {
  const auto make = [](const std::string& directory) {
    return ::mkdir(directory.c_str(), 0700) == 0 || errno == EEXIST;
  };
  if (make(path)) return ok_status();
  if (errno == ENOENT) {
    const std::string parent = std::filesystem::path(path).parent_path().string();
    if (!parent.empty() && parent != path) {
      KT_TRY_STATUS(make_directories(parent));
      if (make(path)) return ok_status();
    }
  }
  return os_error("mkdir", path, kFix);
}

// Whether `name` in the directory is still the file behind `fd`.
bool is_named(int directory, const std::string& name, int fd) {
  struct stat named {};
  struct stat opened {};
  return ::fstatat(directory, name.c_str(), &named, AT_SYMLINK_NOFOLLOW) == 0 && ::fstat(fd, &opened) == 0 &&
         named.st_ino == opened.st_ino && named.st_dev == opened.st_dev;
}

}  // namespace

Result<CacheDirectory> CacheDirectory::open(const std::string& path) {
  std::string trimmed = path;
  while (trimmed.size() > 1 && trimmed.ends_with('/')) trimmed.pop_back();
  KT_TRY_STATUS(make_directories(trimmed));
  UniqueFd fd(::open(trimmed.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  struct stat info {};
  if (!fd.valid() || ::fstat(fd.get(), &info) != 0) return os_error("open", trimmed, kFix);
  if (std::string why = unsafe(info); !why.empty()) {
    return Error{ErrorCode::kPermission, "cannot use the directory " + trimmed, std::move(why), kFix};
  }
  CacheDirectory directory(std::move(trimmed), std::move(fd));
  directory.remove_stale();
  return directory;
}

// The name of a temporary belongs to whoever holds the lock on its file, so it cannot pass to another file between the
// look at it and the unlink.
void CacheDirectory::remove_stale() const {
  const int listing = ::openat(fd_.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (listing < 0) return;
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(::fdopendir(listing), ::closedir);
  if (stream == nullptr) {
    ::close(listing);
    return;
  }
  while (const dirent* const entry = ::readdir(stream.get())) {
    const std::string name = entry->d_name;
    if (!name.ends_with(kTemporaryEnd)) continue;
    const UniqueFd fd(::openat(fd_.get(), name.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
    if (!fd.valid() || ::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) continue;
    if (is_named(fd_.get(), name, fd.get())) ::unlinkat(fd_.get(), name.c_str(), 0);
  }
}

Result<UniqueFd> CacheDirectory::open_file(const std::string& name) const {
  // O_NONBLOCK: opening a FIFO must not wait for a writer.
  UniqueFd fd(::openat(fd_.get(), name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  struct stat info {};
  if (!fd.valid() || ::fstat(fd.get(), &info) != 0) {
    const int saved = errno;
    Error error = os_error("open", path_of(name), kFix);
    if (saved == ENOENT) error.code = ErrorCode::kNotFound;
    if (saved == ELOOP) error.code = ErrorCode::kPermission;  // A link: not a file of ours.
    return error;
  }
  std::string why = S_ISREG(info.st_mode) ? unsafe(info) : "it is not a regular file";
  if (why.empty()) return fd;
  return Error{ErrorCode::kPermission, "cannot use " + path_of(name), std::move(why), kFix};
}

void CacheDirectory::remove_file(const std::string& name) const { ::unlinkat(fd_.get(), name.c_str(), 0); }

Status CacheDirectory::require_room(std::uint64_t bytes) const {
  struct statvfs info {};
  if (::fstatvfs(fd_.get(), &info) != 0) return os_error("statvfs", path_, kFix);
  const std::uint64_t free = std::uint64_t{info.f_bavail} * info.f_frsize;
  const std::uint64_t needed = bytes + bytes / kSpareShare;
  if (needed <= free) return ok_status();
  return Error{ErrorCode::kNoResources, "no room in " + path_,
               bytes_text(needed) + " are needed, " + bytes_text(free) + " are free",
               "free space there, give --weight-cache another directory, or off"};
}

Result<CacheDirectory::NewFile> CacheDirectory::create_file(const std::string& name, std::uint64_t bytes) const {
  KT_TRY_STATUS(require_room(bytes));
  const std::string temporary = name + std::string(kTemporaryEnd);
  const auto busy = [&] {
    return Error{ErrorCode::kAlreadyRunning, "cannot write " + path_of(temporary), "another process has it",
                 "it writes the same: nothing to do"};
  };
  UniqueFd fd(::openat(fd_.get(), temporary.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!fd.valid() && errno == EEXIST) return busy();
  if (!fd.valid()) return os_error("open", path_of(temporary), kFix);
  // Before it had the lock, another process may have taken it for a dead writer's and removed it.
  if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno == EWOULDBLOCK) return busy();
    Error error = os_error("flock", path_of(temporary), kFix);
    ::unlinkat(fd_.get(), temporary.c_str(), 0);
    return error;
  }
  if (!is_named(fd_.get(), temporary, fd.get())) return busy();
  NewFile file(*this, name, std::move(fd));
  // Room that others could take meanwhile. Where the file system cannot reserve it, a write fails later.
  if (::fallocate(file.fd(), 0, 0, static_cast<off_t>(bytes)) != 0 && errno != EOPNOTSUPP && errno != EINTR) {
    return os_error("fallocate", path_of(temporary) + ", " + std::to_string(bytes) + " bytes", kFix);
  }
  return file;
}

std::string CacheDirectory::NewFile::temporary_name() const { return name_ + std::string(kTemporaryEnd); }

Status CacheDirectory::NewFile::publish() {
  const std::string temporary = temporary_name();
  if (::fsync(fd_.get()) != 0) return os_error("fsync", directory_->path_of(temporary), kFix);
  const int directory = directory_->fd_.get();
  if (::renameat(directory, temporary.c_str(), directory, name_.c_str()) != 0) {
    return os_error("rename", directory_->path_of(temporary), kFix);
  }
  fd_.reset();
  // What this makes last is the name only: without it, the next start makes the file again.
  static_cast<void>(::fsync(directory));
  return ok_status();
}

CacheDirectory::NewFile::~NewFile() {
  if (fd_.valid()) ::unlinkat(directory_->fd_.get(), temporary_name().c_str(), 0);
}

}  // namespace kt::coproc
