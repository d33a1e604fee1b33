// Result<T>: a value or an Error. The error channel of the whole project, also across the wire.
#pragma once
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <variant>

namespace kt {

// Part of the wire protocol (reply lines and control packets carry it): append only, never renumber.
enum class ErrorCode : std::uint32_t {
  kOk = 0,
  kInvalidArgument = 1,   // A malformed request or value; on the wire: a protocol error, the session ends.
  kNotFound = 2,          // No such activation, adapter, file, daemon, …
  kTimeout = 3,           // A collective's deadline passed: names who is missing and its last request.
  kRankDied = 4,          // A member of the job died or left: names rank, layer, step.
  kCoprocDied = 5,        // The daemon died, or is shutting down: names its pid.
  kDisagreement = 6,      // Members of a job asked for different things: names ranks, field, values.
  kStale = 7,             // An activation of another step (torch: "modified by an inplace operation").
  kActivationLimit = 8,   // activation_bytes_max reached even with X only.
  kModelMismatch = 9,     // Another checkpoint than the daemon's.
  kVersionMismatch = 10,  // The two ends speak different protocol versions.
  kOs = 11,               // A system call failed.
  kUnsupported = 12,      // Understood, and refused: the message says what to do instead.
  kLoading = 13,          // The daemon is still loading.
  kBadModel = 14,         // The checkpoint cannot be served. Exit code 66.
  kNoResources = 15,      // Missing ISA, memory or huge pages. Exit code 69.
  kAlreadyRunning = 16,   // Another daemon owns the socket. Exit code 75.
  kPermission = 17,       // Unsafe permissions, or not your daemon. Exit code 77.
  kUsage = 18,            // Command line or configuration. Exit code 2.
};

// For people: three lines, the last of stderr and of exception messages (see text()).
struct Error {
  ErrorCode code = ErrorCode::kOk;
  std::string what;  // What failed, on which file, path or object.
  std::string why;   // Why, with numbers.
  std::string fix;   // What to run or change.

  // "error: <what>\n  why: <why>\n  fix: <fix>"
  std::string text() const { return "error: " + what + "\n  why: " + why + "\n  fix: " + fix; }
};

template <class T = std::monostate>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}

  bool ok() const { return state_.index() == 0; }
  T& value() & {
    require_ok();
    return std::get<0>(state_);
  }
  const T& value() const& {
    require_ok();
    return std::get<0>(state_);
  }
  T&& value() && {
    require_ok();
    return std::get<0>(std::move(state_));
  }
  const Error& error() const& { return std::get<1>(state_); }
  Error&& error() && { return std::get<1>(std::move(state_)); }

 private:
  void require_ok() const {
    if (ok()) return;
    std::fprintf(stderr, "Result::value() on %s\n", std::get<1>(state_).text().c_str());
    std::abort();
  }
  std::variant<T, Error> state_;
};

using Status = Result<std::monostate>;
inline Status ok_status() { return Status(std::monostate{}); }

// "open(/x/y): No such file or directory". Reads errno: call it before anything else can change it.
inline Error os_error(const char* call, const std::string& subject, std::string fix) {
  const int saved = errno;
  return Error{ErrorCode::kOs, std::string(call) + "(" + subject + ") failed",
               std::string(std::strerror(saved)) + " (errno " + std::to_string(saved) + ")", std::move(fix)};
}

// Our bug, not the user's: message and abort. Never on bytes another process can write.
#define KT_CHECK(condition)                                                                 \
  do {                                                                                      \
    if (!(condition)) {                                                                     \
      std::fprintf(stderr, "%s:%d: KT_CHECK failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                         \
    }                                                                                       \
  } while (false)
#ifdef NDEBUG
#define KT_DCHECK(condition) static_cast<void>(0)
#else
#define KT_DCHECK(condition) KT_CHECK(condition)
#endif

// KT_TRY(auto segment, Segment::open(name)); returns the error to the caller, or binds the value.
#define KT_CONCAT_INNER(a, b) a##b
#define KT_CONCAT(a, b) KT_CONCAT_INNER(a, b)
#define KT_TRY(declaration, expression) KT_TRY_IMPL(KT_CONCAT(kt_try_, __COUNTER__), declaration, expression)
#define KT_TRY_IMPL(result, declaration, expression)  \
  auto result = (expression);                         \
  if (!result.ok()) return std::move(result).error(); \
  declaration = std::move(result).value()
// KT_TRY_STATUS(expression); the same for a Status.
#define KT_TRY_STATUS(expression)                                                            \
  do {                                                                                       \
    if (auto kt_status = (expression); !kt_status.ok()) return std::move(kt_status).error(); \
  } while (false)

}  // namespace kt
