#include "coproc/daemon/cli.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <string_view>
#include <system_error>

#include "shm/control.h"
#include "shm/text.h"

namespace kt::coproc {

int exit_code(ErrorCode code) {
  switch (code) {
    case ErrorCode::kOk:
      return kExitOk;
    case ErrorCode::kUsage:
      return kExitUsage;
    case ErrorCode::kNotFound:
      return kExitNoDaemon;
    case ErrorCode::kBadModel:
      return kExitBadModel;
    case ErrorCode::kNoResources:
      return kExitNoResources;
    case ErrorCode::kOs:
      return kExitOs;
    case ErrorCode::kAlreadyRunning:
      return kExitAlreadyRunning;
    case ErrorCode::kPermission:
      return kExitPermission;
    default:
      return kExitRuntimeFailure;
  }
}

int report(const Error& error) {
  // A line break inside a field (a path may hold one) would make more than three lines of it.
  const Error lines{error.code, shm::one_line(error.what), shm::one_line(error.why), shm::one_line(error.fix)};
  std::fflush(stdout);
  std::fprintf(stderr, "%s\n", lines.text().c_str());
  return exit_code(error.code);
}

Result<Parsed> parse_arguments(CLI::App& app, const std::vector<std::string>& arguments) {
  std::vector<std::string> reversed(arguments.rbegin(), arguments.rend());
  try {
    app.parse(std::move(reversed));
    return Parsed::kRun;
  } catch (const CLI::CallForHelp&) {
    std::cout << app.help() << std::flush;
    return Parsed::kHelpShown;
  } catch (const CLI::Error& refused) {
    return Error{ErrorCode::kUsage, "cannot use these arguments of " + app.get_name(), refused.what(),
                 app.get_name() + " --help shows what it takes"};
  }
}

Result<std::string> socket_address(const std::string& socket_option) {
  if (socket_option == "auto" || socket_option.rfind("unix:", 0) == 0) return socket_option;
  std::error_code error;
  const std::filesystem::path absolute = std::filesystem::absolute(socket_option, error);
  if (socket_option.empty() || error) {
    return Error{ErrorCode::kUsage, "cannot use the socket path '" + socket_option + "'",
                 socket_option.empty() ? "it is empty" : error.message(),
                 "give --socket a path: --socket /run/kt-coproc/kt.sock"};
  }
  return "unix:" + absolute.lexically_normal().string();
}

Result<std::string> client_socket_path(const std::string& socket_option) {
  if (!socket_option.empty()) {
    KT_TRY(const std::string address, socket_address(socket_option));
    return shm::resolve_socket_path(address);
  }
  const char* const variable = std::getenv("KT_COPROC");
  const std::string_view address = variable == nullptr ? "" : variable;
  return shm::resolve_socket_path(address == "off" ? "auto" : std::string(address));
}

}  // namespace kt::coproc
