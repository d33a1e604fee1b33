// status, wait, env, stop: the verbs that talk to a daemon.
#include <chrono>
#include <cstdio>
#include <optional>
#include <string>

#include "coproc/daemon/cli.h"
#include "coproc/daemon/monitor.h"
#include "coproc/daemon/status_table.h"
#include "coproc/daemon/verbs.h"
#include "shm/control.h"

namespace kt::coproc {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

void add_socket_option(CLI::App& app, std::string& socket) {
  // An empty one is a mistake, mostly of a shell variable, and no way to say "the usual places".
  const auto not_empty = [](const std::string& path) { return std::string(path.empty() ? "the path is empty" : ""); };
  app.add_option("--socket", socket, "socket of the daemon (default: KT_COPROC, else the usual places)")
      ->type_name("PATH")
      ->check(not_empty);
}

int state_exit_code(shm::DaemonState state) {
  switch (state) {
    case shm::DaemonState::kServing:
      return kExitOk;
    case shm::DaemonState::kLoading:
      return kExitLoading;
    default:
      return kExitNotServing;
  }
}

// A path as a word of a shell. Common ones need no quotes.
std::string shell_word(const std::string& text) {
  const std::string plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_/.:-+@%,=";
  if (text.find_first_not_of(plain) == std::string::npos) return text;
  std::string word = "'";
  for (const char c : text) word += c == '\'' ? "'\\''" : std::string(1, c);
  return word + "'";
}

Result<Monitor> connect_to(const std::string& socket_option) {
  KT_TRY(const std::string path, client_socket_path(socket_option));
  return Monitor::connect(path);
}

}  // namespace

int status_verb(const Arguments& arguments) {
  CLI::App app("Shows what the daemon is doing. Exit code: 0 serving, 3 no daemon, 4 loading, 5 stalled or draining.",
               "kt-coproc status");
  std::string socket;
  bool json = false;
  add_socket_option(app, socket);
  app.add_flag("--json", json, "the whole state as one JSON object");
  const auto parsed = parse_arguments(app, arguments);
  if (!parsed.ok()) return report(parsed.error());
  if (parsed.value() == Parsed::kHelpShown) return kExitOk;

  const auto monitor = connect_to(socket);
  if (!monitor.ok()) {
    report(monitor.error());
    return monitor.error().code == ErrorCode::kTimeout ? kExitNotServing : exit_code(monitor.error().code);
  }
  const nlohmann::json status = shm::status_json(monitor.value().page());
  const std::string text = json ? status.dump(2) + "\n" : status_table(status);
  std::fputs(text.c_str(), stdout);
  return state_exit_code(monitor.value().state());
}

int env_verb(const Arguments& arguments) {
  CLI::App app("Prints the line that makes a shell's training jobs use the daemon: eval \"$(kt-coproc env)\"",
               "kt-coproc env");
  std::string socket;
  add_socket_option(app, socket);
  const auto parsed = parse_arguments(app, arguments);
  if (!parsed.ok()) return report(parsed.error());
  if (parsed.value() == Parsed::kHelpShown) return kExitOk;

  const auto path = client_socket_path(socket);
  if (!path.ok()) return report(path.error());
  if (const auto connected = shm::connect_daemon(path.value()); !connected.ok()) return report(connected.error());
  std::printf("export KT_COPROC=%s\n", shell_word("unix:" + path.value()).c_str());
  return kExitOk;
}

int wait_verb(const Arguments& arguments) {
  CLI::App app(
      "Waits until a daemon serves; it need not have started yet. Exit code: 0 it serves, 3 it went away, 124 timeout.",
      "kt-coproc wait");
  std::string socket;
  bool ready = false;
  double timeout_seconds = 0;
  add_socket_option(app, socket);
  app.add_flag("--ready", ready, "wait until the weights are loaded")->required();
  CLI::Option* const timeout = app.add_option("--timeout", timeout_seconds, "give up after S seconds (default: never)")
                                   ->type_name("S")
                                   ->check(CLI::Range(0.0, 1e9));
  const auto parsed = parse_arguments(app, arguments);
  if (!parsed.ok()) return report(parsed.error());
  if (parsed.value() == Parsed::kHelpShown) return kExitOk;

  const bool has_deadline = timeout->count() > 0;
  const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                           std::chrono::duration<double>(has_deadline ? timeout_seconds : 0));
  std::string last_path;
  const auto find_path = [&]() -> Result<std::string> {
    KT_TRY(last_path, client_socket_path(socket));
    return last_path;
  };
  const auto give_up = [&]() -> std::optional<Readiness> {
    if (has_deadline && Clock::now() >= deadline) return Readiness::kTimeout;
    return std::nullopt;
  };
  const auto waited = wait_ready(find_path, /*verbose=*/true, give_up);
  if (!waited.ok()) return report(waited.error());
  if (waited.value() == Readiness::kGone) {
    report(Error{ErrorCode::kNotFound, "the daemon at " + last_path + " went away", "it ended before it was ready",
                 "see what it printed; start it again: kt-coproc run --model DIR"});
    return kExitNoDaemon;
  }
  if (waited.value() == Readiness::kTimeout) {
    report(Error{ErrorCode::kTimeout, "no daemon is ready at " + last_path,
                 "waited " + CLI::detail::to_string(timeout_seconds) + " s",
                 "see kt-coproc status; start one: kt-coproc run --model DIR"});
    return kExitTimeout;
  }
  return kExitOk;
}

int stop_verb(const Arguments& arguments) {
  CLI::App app("Ends the daemon and returns when its process has gone. Requests in flight complete.", "kt-coproc stop");
  std::string socket;
  bool drain = false;
  add_socket_option(app, socket);
  app.add_flag("--drain", drain, "take no new sessions, and wait for the attached ones to leave first");
  const auto parsed = parse_arguments(app, arguments);
  if (!parsed.ok()) return report(parsed.error());
  if (parsed.value() == Parsed::kHelpShown) return kExitOk;

  const auto monitor = connect_to(socket);
  if (!monitor.ok()) return report(monitor.error());
  const std::uint32_t pid = monitor.value().page().pid;
  const auto asked = shm::call(monitor.value().socket(), {{"op", "stop"}, {"drain", drain}}, kAnswerTimeout);
  // It may have been stopped by somebody else meanwhile, which is as good.
  if (!asked.ok() && asked.error().code != ErrorCode::kNotFound) return report(asked.error());
  if (!monitor.value().wait_process_ended(drain ? milliseconds(-1) : kStopTimeout)) {
    return report(Error{ErrorCode::kTimeout, "the daemon (pid " + std::to_string(pid) + ") does not end",
                        "it was asked to " + std::to_string(kStopTimeout.count() / 1000) + " s ago",
                        "see what it printed, or end it: kill -9 " + std::to_string(pid)});
  }
  std::printf("kt-coproc (pid %u) has stopped\n", pid);
  return kExitOk;
}

}  // namespace kt::coproc
