// `kt-coproc run`: the life of the daemon, from its options to its exit.
#pragma once
#include "coproc/daemon/options.h"
#include "shm/base/result.h"

namespace kt::coproc {

// Serves until SIGTERM, SIGINT or `kt-coproc stop`. What is wrong with model, CPU, memory, directory or socket is found
// before anything is started; a load error afterwards removes the socket again. Call it before any other thread exists.
Status run_daemon(const RunOptions& options);

}  // namespace kt::coproc
