// kt-top: a live screen of one daemon. It asks the daemon for its status page once and then only reads that memory.
#include <poll.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "shm/control.h"
#include "shm/status_page.h"
#include "tools/kt_top/terminal.h"
#include "tools/kt_top/view.h"

namespace {

// As `kt-coproc status`: coproc/README.md.
constexpr int kExitOk = 0;
constexpr int kExitFailure = 1;
constexpr int kExitUsage = 2;
constexpr int kExitNoDaemon = 3;
constexpr int kExitLoading = 4;
constexpr int kExitNotServing = 5;
constexpr int kExitPermission = 77;

int exit_code(const kt::Error& error) {
  switch (error.code) {
    case kt::ErrorCode::kUsage:
      return kExitUsage;
    case kt::ErrorCode::kNotFound:
    case kt::ErrorCode::kTimeout:
    case kt::ErrorCode::kCoprocDied:
      return kExitNoDaemon;
    case kt::ErrorCode::kPermission:
      return kExitPermission;
    default:
      return kExitFailure;
  }
}

int exit_code(const nlohmann::json& status) {
  const std::string state = status.value("state", "");
  if (state == "serving") return kExitOk;
  return state == "loading" ? kExitLoading : kExitNotServing;
}

struct Monitor {
  kt::UniqueFd socket;  // Its hang-up tells that the daemon is gone.
  kt::shm::StatusPageView view;
};

kt::Result<Monitor> connect(const std::string& spec) {
  KT_TRY(const std::string path, kt::shm::resolve_socket_path(spec));
  KT_TRY(kt::UniqueFd socket, kt::shm::connect_daemon(path));
  KT_TRY(kt::shm::Packet packet, kt::shm::call(socket.get(), {{"op", "status"}}, std::chrono::seconds(10)));
  if (packet.descriptors.empty()) {
    return kt::Error{kt::ErrorCode::kVersionMismatch, "no status page from the daemon at " + path,
                     "its reply carries 0 descriptors, expected 1", "use the kt-top of the daemon's version"};
  }
  KT_TRY(kt::shm::StatusPageView view, kt::shm::StatusPageView::attach(std::move(packet.descriptors.front())));
  return Monitor{std::move(socket), std::move(view)};
}

int show_once(const Monitor& monitor, bool json) {
  const nlohmann::json status = kt::shm::status_json(monitor.view.page());
  if (json) {
    std::puts(status.dump(2).c_str());
  } else {
    for (const std::string& line : kt::top::render(status, 80, 24)) std::puts(line.c_str());
  }
  return exit_code(status);
}

// Redraws until q, a signal, or the daemon's end.
int show_live(const Monitor& monitor, int interval_ms) {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) sigaddset(&signals, signal);
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  const kt::UniqueFd signal_fd(signalfd(-1, &signals, SFD_CLOEXEC));
  const kt::top::Terminal terminal;
  for (;;) {
    const kt::top::TerminalSize size = terminal.size();
    auto lines = kt::top::render(kt::shm::status_json(monitor.view.page()), size.columns, size.rows - 1);
    lines.resize(static_cast<std::size_t>(size.rows - 1));
    lines.emplace_back("q: quit");
    terminal.draw(lines);
    pollfd events[] = {{signal_fd.get(), POLLIN, 0}, {STDIN_FILENO, POLLIN, 0}, {monitor.socket.get(), POLLRDHUP, 0}};
    if (poll(events, std::size(events), interval_ms) <= 0) continue;
    if (events[0].revents != 0) return kExitOk;
    if (events[2].revents != 0) return kExitNoDaemon;
    char key = 0;
    if (events[1].revents != 0 && (read(STDIN_FILENO, &key, 1) <= 0 || key == 'q' || key == 'Q')) return kExitOk;
  }
}

int fail(const kt::Error& error) {
  std::fprintf(stderr, "%s\n", error.text().c_str());
  return exit_code(error);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"kt-top: what the co-process is doing, and what it is bound by"};
  const char* env = std::getenv("KT_COPROC");
  std::string socket_path;
  bool once = false;
  bool json = false;
  double interval_seconds = 1.0;
  app.add_option("--socket", socket_path, "Socket of the daemon (else KT_COPROC, else the usual places)");
  app.add_flag("--once", once, "Print one screen and exit: 0 serving, 3 no daemon, 4 loading, 5 stalled or draining");
  app.add_flag("--json", json, "With --once: the status object as JSON");
  app.add_option("--interval", interval_seconds, "Seconds between two screens")->check(CLI::Range(0.1, 3600.0));
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    return fail({kt::ErrorCode::kUsage, "kt-top: cannot use this command line", error.what(), "run: kt-top --help"});
  }
  if (json && !once) {
    return fail({kt::ErrorCode::kUsage, "kt-top: --json without --once", "the live screen is not JSON",
                 "run: kt-top --once --json"});
  }
  if (!once && isatty(STDOUT_FILENO) == 0) {
    return fail({kt::ErrorCode::kUsage, "kt-top: the live screen needs a terminal", "standard output is not one",
                 "run: kt-top --once"});
  }
  const std::string spec = !socket_path.empty() ? "unix:" + socket_path : (env != nullptr ? env : "auto");
  auto monitor = connect(spec == "off" ? "auto" : spec);
  if (!monitor.ok()) return fail(monitor.error());
  if (once) return show_once(monitor.value(), json);
  const int code = show_live(monitor.value(), static_cast<int>(interval_seconds * 1000.0));
  if (code == kExitNoDaemon) {
    return fail({kt::ErrorCode::kNotFound, "kt-top: the daemon went away", "its control socket closed",
                 "run: kt-coproc status"});
  }
  return code;
}
