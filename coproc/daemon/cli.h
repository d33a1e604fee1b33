// What every verb shares on its way in and out: arguments, exit codes, three-line errors.
#pragma once
#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "shm/base/result.h"

namespace kt::coproc {

// Exit codes (coproc/README.md). Verbs with meanings of their own (status, wait, exec) say so where they return them.
inline constexpr int kExitOk = 0;
inline constexpr int kExitRuntimeFailure = 1;
inline constexpr int kExitUsage = 2;
inline constexpr int kExitNoDaemon = 3;
inline constexpr int kExitLoading = 4;
inline constexpr int kExitNotServing = 5;  // Stalled or draining.
inline constexpr int kExitBadModel = 66;
inline constexpr int kExitNoResources = 69;
inline constexpr int kExitOs = 71;
inline constexpr int kExitAlreadyRunning = 75;
inline constexpr int kExitPermission = 77;
inline constexpr int kExitTimeout = 124;
inline constexpr int kExitNotExecutable = 126;
inline constexpr int kExitNotFound = 127;

int exit_code(ErrorCode code);

// Prints the three lines to standard error and returns the error's exit code.
int report(const Error& error);

enum class Parsed { kRun, kHelpShown };

// Parses the arguments behind the verb. kUsage for everything CLI11 refuses; --help prints and is kHelpShown.
Result<Parsed> parse_arguments(CLI::App& app, const std::vector<std::string>& arguments);

// The socket a client verb talks to: --socket PATH, else KT_COPROC (off counts as unset: it is the training job's),
// else the auto search.
Result<std::string> client_socket_path(const std::string& socket_option);

// "/path" and "path" as "unix:/absolute/path"; "unix:…" and "auto" stay.
Result<std::string> socket_address(const std::string& socket_option);

}  // namespace kt::coproc
