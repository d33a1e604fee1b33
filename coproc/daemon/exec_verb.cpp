// kt-coproc exec: a daemon for one command.
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "coproc/daemon/cli.h"
#include "coproc/daemon/monitor.h"
#include "coproc/daemon/options.h"
#include "coproc/daemon/verbs.h"

namespace kt::coproc {
namespace {

constexpr std::size_t kSocketPathBytesMax = 107;
constexpr int kForwarded[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};

// The signals this process handles itself: blocked here, as they were in the children.
class Signals {
 public:
  Signals() {
    sigemptyset(&handled_);
    for (const int signal : kForwarded) sigaddset(&handled_, signal);
    sigaddset(&handled_, SIGCHLD);
    ::sigprocmask(SIG_BLOCK, &handled_, &before_);
  }
  void restore_in_child() const { ::sigprocmask(SIG_SETMASK, &before_, nullptr); }

  // The next signal, or nullopt when none came in time. SIGCHLD: some child ended.
  std::optional<siginfo_t> wait(std::chrono::milliseconds timeout) const {
    const auto whole = std::chrono::duration_cast<std::chrono::seconds>(timeout);
    const timespec limit{whole.count(), std::chrono::nanoseconds(timeout - whole).count()};
    siginfo_t info{};
    if (::sigtimedwait(&handled_, &info, &limit) < 0) return std::nullopt;
    return info;
  }

 private:
  sigset_t handled_{};
  sigset_t before_{};
};

// A directory of our own for the socket; removed with what the daemon leaves in it.
class PrivateDirectory {
 public:
  static Result<PrivateDirectory> create() {
    int last_errno = ENAMETOOLONG;
    for (const std::string& base : bases()) {
      std::string path = base + "/kt-coproc-XXXXXX";
      if (path.size() + std::strlen("/kt.sock") > kSocketPathBytesMax) continue;
      if (::mkdtemp(path.data()) != nullptr) return PrivateDirectory(path);
      last_errno = errno;
    }
    errno = last_errno;
    return os_error("mkdtemp", "kt-coproc-XXXXXX", "set XDG_RUNTIME_DIR or TMPDIR to a short path we can write to");
  }
  PrivateDirectory(PrivateDirectory&& other) noexcept : path_(std::exchange(other.path_, "")) {}
  PrivateDirectory& operator=(PrivateDirectory&&) = delete;
  ~PrivateDirectory() {
    if (path_.empty()) return;
    ::unlink(socket_path().c_str());
    ::unlink((socket_path() + ".lock").c_str());
    ::rmdir(path_.c_str());
  }
  std::string socket_path() const { return path_ + "/kt.sock"; }

 private:
  explicit PrivateDirectory(std::string path) : path_(std::move(path)) {}
  static std::vector<std::string> bases() {
    std::vector<std::string> paths;
    const auto add = [&](const char* path) {
      if (path != nullptr && path[0] == '/') paths.emplace_back(path);
    };
    add(std::getenv("XDG_RUNTIME_DIR"));
    add("/run");
    add(std::getenv("TMPDIR"));
    add("/tmp");
    return paths;
  }
  std::string path_;
};

int status_code(int wait_status) {
  return WIFSIGNALED(wait_status) ? 128 + WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
}

// A child that we wait for once.
class Child {
 public:
  explicit Child(pid_t pid) : pid_(pid) {}
  pid_t pid() const { return pid_; }
  // The wait status, once it has ended.
  std::optional<int> try_wait() {
    if (!status_ && ::waitpid(pid_, &raw_, WNOHANG) == pid_) status_ = raw_;
    return status_;
  }
  void kill(int signal) {
    if (!try_wait()) ::kill(pid_, signal);
  }

 private:
  pid_t pid_;
  int raw_ = 0;
  std::optional<int> status_;
};

[[noreturn]] void become(const std::vector<std::string>& words, int failure_fd) {
  std::vector<char*> argv;
  for (const std::string& word : words) argv.push_back(const_cast<char*>(word.c_str()));  // exec does not write them.
  argv.push_back(nullptr);
  ::execvp(argv[0], argv.data());
  const int failure = errno;
  [[maybe_unused]] const ssize_t written = ::write(failure_fd, &failure, sizeof failure);
  ::_exit(kExitNotFound);
}

// Forks and executes. An exec that fails is an error of code kOs, with errno in `exec_errno`.
template <class InChild>
Result<Child> start(const std::vector<std::string>& words, const Signals& signals, int& exec_errno,
                    const InChild& in_child) {
  exec_errno = 0;
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0)
    return os_error("pipe2", words[0], "raise the limit on open files: ulimit -n");
  const UniqueFd reader(ends[0]);
  UniqueFd writer(ends[1]);
  const pid_t pid = ::fork();
  if (pid < 0) return os_error("fork", words[0], "raise the limit on processes: ulimit -u");
  if (pid == 0) {
    signals.restore_in_child();
    in_child();
    become(words, writer.get());
  }
  writer.reset();
  int failure = 0;
  if (::read(reader.get(), &failure, sizeof failure) != sizeof failure) return Child(pid);
  ::waitpid(pid, nullptr, 0);
  exec_errno = failure;
  return Error{ErrorCode::kOs, "cannot run '" + words[0] + "'", std::strerror(failure),
               "check the command after -- and PATH"};
}

// This program, by the name that ps should show.
std::string own_path() {
  std::error_code error;
  const std::filesystem::path path = std::filesystem::read_symlink("/proc/self/exe", error);
  return !error && std::filesystem::exists(path, error) ? path.string() : "/proc/self/exe";
}

Result<Child> start_daemon(const Arguments& flags, const std::string& socket_path, const Signals& signals) {
  Arguments words = {own_path(), "run"};
  words.insert(words.end(), flags.begin(), flags.end());
  words.insert(words.end(), {"--socket", socket_path});
  const pid_t parent = ::getpid();
  int exec_errno = 0;
  return start(words, signals, exec_errno, [&] {
    // Ctrl-C is for the command; the daemon ends after it. If we are killed, it ends too.
    ::setpgid(0, 0);
    ::prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (::getppid() != parent) ::_exit(kExitRuntimeFailure);
    const int null = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (null >= 0) ::dup2(null, STDIN_FILENO);
  });
}

// The daemon with its directory; both go with this object.
class PrivateDaemon {
 public:
  PrivateDaemon(Child child, const Signals& signals) : child_(child), signals_(signals) {}
  PrivateDaemon(const PrivateDaemon&) = delete;
  PrivateDaemon& operator=(const PrivateDaemon&) = delete;
  ~PrivateDaemon() {
    child_.kill(SIGTERM);
    const auto deadline = std::chrono::steady_clock::now() + kStopTimeout;
    while (!child_.try_wait()) {
      if (std::chrono::steady_clock::now() >= deadline) child_.kill(SIGKILL);
      signals_.wait(std::chrono::milliseconds(100));  // Its SIGCHLD, most likely.
    }
  }
  std::optional<int> ended() { return child_.try_wait(); }

 private:
  Child child_;
  const Signals& signals_;
};

// What exec ends with. An error is printed last, after the daemon's own last lines.
struct Outcome {
  int code = kExitOk;
  std::optional<Error> error;
};
Outcome failed(Error error) {
  const int code = exit_code(error.code);
  return {code, std::move(error)};
}

// nullopt: ready.
std::optional<Outcome> wait_until_ready(PrivateDaemon& daemon, const std::string& socket_path, const Signals& signals) {
  int interrupted_by = 0;
  const auto give_up = [&]() -> std::optional<Readiness> {
    while (const auto info = signals.wait(std::chrono::milliseconds(0))) {
      if (info->si_signo != SIGCHLD) interrupted_by = info->si_signo;
    }
    if (interrupted_by != 0) return Readiness::kInterrupted;
    if (daemon.ended()) return Readiness::kGone;
    return std::nullopt;
  };
  const auto find_path = [&] { return Result<std::string>(socket_path); };
  auto waited = wait_ready(find_path, /*verbose=*/false, give_up);
  if (!waited.ok()) return failed(std::move(waited).error());
  if (waited.value() == Readiness::kReady) return std::nullopt;
  if (waited.value() == Readiness::kInterrupted) return Outcome{128 + interrupted_by, std::nullopt};
  // The connection's end comes before the process': its status takes a moment.
  for (int i = 0; i < 100 && !daemon.ended(); ++i) signals.wait(std::chrono::milliseconds(100));
  const int status = daemon.ended().value_or(0);
  // The daemon itself printed why, in three lines.
  if (WIFEXITED(status) && WEXITSTATUS(status) != 0) return Outcome{WEXITSTATUS(status), std::nullopt};
  return failed(Error{ErrorCode::kCoprocDied, "the daemon ended before it was ready",
                      WIFSIGNALED(status) ? "killed by signal " + std::to_string(WTERMSIG(status)) : "it was stopped",
                      "start it by hand to see more: kt-coproc run"});
}

Outcome run_command(const Arguments& command, const std::string& socket_path, PrivateDaemon& daemon,
                    const Signals& signals) {
  int exec_errno = 0;
  auto started = start(command, signals, exec_errno,
                       [&] { ::setenv("KT_COPROC", ("unix:" + socket_path).c_str(), /*overwrite=*/1); });
  if (!started.ok()) {
    Outcome outcome = failed(std::move(started).error());
    if (exec_errno != 0) {
      outcome.code = exec_errno == ENOENT || exec_errno == ENOTDIR ? kExitNotFound : kExitNotExecutable;
    }
    return outcome;
  }
  Child child = std::move(started).value();
  bool told = false;
  for (;;) {
    if (const auto status = child.try_wait()) return {status_code(*status), std::nullopt};
    if (daemon.ended() && !std::exchange(told, true)) {
      std::fprintf(stderr, "kt-coproc exec: the daemon has ended while the command runs\n");
    }
    const auto info = signals.wait(std::chrono::milliseconds(1000));
    if (!info || info->si_signo == SIGCHLD) continue;
    // What the terminal sends, the command got itself: it is in the same process group.
    if (info->si_code != SI_KERNEL) child.kill(info->si_signo);
  }
}

// The daemon and its directory are gone when this returns.
Outcome run_with_daemon(const Arguments& flags, const Arguments& command) {
  const Signals signals;
  auto directory = PrivateDirectory::create();
  if (!directory.ok()) return failed(std::move(directory).error());
  const std::string socket_path = directory.value().socket_path();
  auto child = start_daemon(flags, socket_path, signals);
  if (!child.ok()) return failed(std::move(child).error());
  PrivateDaemon daemon(std::move(child).value(), signals);
  if (auto outcome = wait_until_ready(daemon, socket_path, signals)) return *std::move(outcome);
  return run_command(command, socket_path, daemon, signals);
}

}  // namespace

int exec_verb(const Arguments& arguments) {
  const auto separator = std::find(arguments.begin(), arguments.end(), "--");
  const Arguments flags(arguments.begin(), separator);
  CLI::App app(
      "kt-coproc exec --model DIR [flags of run] -- CMD…: starts a daemon on a private socket, runs CMD with "
      "KT_COPROC\n"
      "set, stops the daemon, and exits with CMD's status (128+n after signal n, 127 when it is not found).",
      "kt-coproc exec");
  RunOptions options;
  const auto parsed = parse_run_options(app, flags, options);
  if (!parsed.ok()) return report(parsed.error());
  if (parsed.value() == Parsed::kHelpShown) return kExitOk;
  if (app.count("--socket") != 0) {
    return report(Error{ErrorCode::kUsage, "exec takes no --socket", "its daemon is private to the command",
                        "leave it out, or use kt-coproc run"});
  }
  const Arguments command(separator == arguments.end() ? separator : separator + 1, arguments.end());
  if (command.empty()) {
    return report(Error{ErrorCode::kUsage, "no command to run", "there is nothing after --",
                        "kt-coproc exec --model DIR -- CMD…"});
  }

  const Outcome outcome = run_with_daemon(flags, command);
  if (outcome.error) report(*outcome.error);
  return outcome.code;
}

}  // namespace kt::coproc
