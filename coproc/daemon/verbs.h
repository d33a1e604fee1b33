// The verbs of kt-coproc, one function each: arguments behind the verb in, exit code out.
#pragma once
#include <string>
#include <vector>

namespace kt::coproc {

using Arguments = std::vector<std::string>;

int run_verb(const Arguments& arguments);
int exec_verb(const Arguments& arguments);
int wait_verb(const Arguments& arguments);
int status_verb(const Arguments& arguments);
int env_verb(const Arguments& arguments);
int stop_verb(const Arguments& arguments);
int bench_verb(const Arguments& arguments);
int version_verb(const Arguments& arguments);

}  // namespace kt::coproc
