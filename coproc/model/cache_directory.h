// A directory of files that are made again when they are lost, and are trusted only where nobody else can write them.
//
// A file appears in it whole or not at all: it is written under another name, NAME.kt-tmp, synced and renamed. Who
// writes that holds a lock on it, which ends with the process: without the lock it is what a dead writer left.
#pragma once
#include <cstdint>
#include <string>

#include "shm/base/result.h"
#include "shm/base/unique_fd.h"

namespace kt::coproc {

class CacheDirectory {
 public:
  // Makes it (mode 0700, with its parents) and removes what dead writers left. kPermission when it is not ours or
  // others may write it.
  static Result<CacheDirectory> open(const std::string& path);

  std::string path_of(const std::string& name) const { return path_ + "/" + name; }

  // To read. kNotFound: there is none; kPermission: not a regular file of ours that only we can write.
  Result<UniqueFd> open_file(const std::string& name) const;
  void remove_file(const std::string& name) const;

  // A file in the making: gone with this object unless published. The directory outlives it.
  class NewFile {
   public:
    NewFile(NewFile&& other) noexcept = default;
    NewFile& operator=(NewFile&&) = delete;
    ~NewFile();
    int fd() const { return fd_.get(); }
    // Synced, and under its name in place of what was there.
    Status publish();

   private:
    friend class CacheDirectory;
    NewFile(const CacheDirectory& directory, std::string name, UniqueFd fd)
        : directory_(&directory), name_(std::move(name)), fd_(std::move(fd)) {}
    std::string temporary_name() const;

    const CacheDirectory* directory_;
    std::string name_;
    UniqueFd fd_;
  };
  // kNoResources with numbers unless there is room for `bytes` and a twentieth more; kAlreadyRunning: another process
  // is writing it.
  Result<NewFile> create_file(const std::string& name, std::uint64_t bytes) const;

 private:
  CacheDirectory(std::string path, UniqueFd fd) : path_(std::move(path)), fd_(std::move(fd)) {}
  void remove_stale() const;
  Status require_room(std::uint64_t bytes) const;

  std::string path_;
  UniqueFd fd_;
};

}  // namespace kt::coproc
