// kt-coproc: finds the verb and runs it.
#include <cstdio>
#include <exception>
#include <string>
#include <string_view>

#include "coproc/daemon/cli.h"
#include "coproc/daemon/verbs.h"

namespace kt::coproc {
namespace {

struct Verb {
  std::string_view name;
  int (*run)(const Arguments&);
  const char* summary;
};
constexpr Verb kVerbs[] = {
    {"run", run_verb, "load a checkpoint's experts and serve them"},
    {"exec", exec_verb, "run one command with a daemon of its own"},
    {"wait", wait_verb, "wait until a daemon serves"},
    {"status", status_verb, "show what the daemon is doing"},
    {"env", env_verb, "print the line that makes training jobs use the daemon"},
    {"stop", stop_verb, "end the daemon"},
    {"bench", bench_verb, "measure this machine, and one layer on it"},
    {"version", version_verb, "print the version"},
};

void print_help() {
  std::printf(
      "kt-coproc: owns a mixture-of-experts model's routed experts and computes them for the training processes\n"
      "of this node.\n\nUsage: kt-coproc VERB [flags]\n\nVerbs:\n");
  for (const Verb& verb : kVerbs) std::printf("  %-8s %s\n", std::string(verb.name).c_str(), verb.summary);
  std::printf(
      "\nkt-coproc VERB --help shows the flags of a verb. A first session:\n"
      "  kt-coproc run --model DIR &\n"
      "  kt-coproc wait --ready\n"
      "  export KT_COPROC=auto        # in the shell of the training job\n");
}

int usage_error(std::string what) {
  std::string names;
  for (const Verb& verb : kVerbs) names += (names.empty() ? "" : ", ") + std::string(verb.name);
  return report(Error{ErrorCode::kUsage, std::move(what), "the verbs are: " + names, "kt-coproc --help"});
}

int run(const Arguments& arguments) {
  if (arguments.empty()) return usage_error("kt-coproc needs a verb");
  const std::string& name = arguments.front();
  if (name == "--help" || name == "-h" || name == "help") {
    print_help();
    return kExitOk;
  }
  const Arguments rest(arguments.begin() + 1, arguments.end());
  if (name == "--version") return version_verb(rest);
  for (const Verb& verb : kVerbs) {
    if (verb.name == name) return verb.run(rest);
  }
  return usage_error("kt-coproc has no verb '" + name + "'");
}

}  // namespace
}  // namespace kt::coproc

int main(int argc, char** argv) {
  try {
    return kt::coproc::run(kt::coproc::Arguments(argv + (argc > 0 ? 1 : 0), argv + argc));
  } catch (const std::exception& failure) {
    // Memory, or a thread that cannot be started: nothing of ours throws.
    return kt::coproc::report(kt::Error{kt::ErrorCode::kOs, "kt-coproc cannot go on", failure.what(),
                                        "see the limits on memory and processes: ulimit -a"});
  }
}
