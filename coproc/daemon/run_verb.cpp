// kt-coproc run and version.
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <cstdio>

#include "coproc/daemon/cli.h"
#include "coproc/daemon/daemon.h"
#include "coproc/daemon/options.h"
#include "coproc/daemon/verbs.h"

namespace kt::coproc {

int run_verb(const Arguments& arguments) {
  CLI::App app("Loads the routed experts of a checkpoint and serves them to the training processes of this node.",
               "kt-coproc run");
  RunOptions options;
  const auto parsed = parse_run_options(app, arguments, options);
  if (!parsed.ok()) return report(parsed.error());
  if (parsed.value() == Parsed::kHelpShown) return kExitOk;

  spdlog::set_default_logger(spdlog::stderr_logger_mt("kt-coproc"));
  spdlog::set_pattern("[%Y-%m-%d %H:%M:%S.%e] [%l] %v");
  const Status status = run_daemon(options);
  return status.ok() ? kExitOk : report(status.error());
}

int version_verb(const Arguments& arguments) {
  CLI::App app("Prints the version.", "kt-coproc version");
  const auto parsed = parse_arguments(app, arguments);
  if (!parsed.ok()) return report(parsed.error());
  if (parsed.value() == Parsed::kRun) std::printf("kt-coproc %s\n", KT_VERSION);
  return kExitOk;
}

}  // namespace kt::coproc
