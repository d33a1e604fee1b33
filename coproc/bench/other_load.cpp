#include "coproc/bench/other_load.h"

#include <unistd.h>

#include <ctime>
#include <fstream>
#include <string>

namespace kt::coproc {
namespace {

constexpr double kShareMax = 0.05;

double ticks_per_second() { return static_cast<double>(::sysconf(_SC_CLK_TCK)); }
double num_cpus() { return static_cast<double>(::sysconf(_SC_NPROCESSORS_ONLN)); }

}  // namespace

OtherLoad::Reading OtherLoad::now() {
  Reading reading;
  reading.time = std::chrono::steady_clock::now();
  timespec own = {};
  std::ifstream file("/proc/stat");
  std::string name;
  double user = 0;
  double nice = 0;
  double system = 0;
  double idle = 0;
  double iowait = 0;
  double irq = 0;
  double softirq = 0;
  double steal = 0;
  reading.is_known = file >> name >> user >> nice >> system >> idle >> iowait >> irq >> softirq >> steal &&
                     name == "cpu" && ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &own) == 0;
  reading.busy_seconds = (user + nice + system + irq + softirq + steal) / ticks_per_second();
  reading.own_seconds = static_cast<double>(own.tv_sec) + 1e-9 * static_cast<double>(own.tv_nsec);
  return reading;
}

bool OtherLoad::is_disturbed() const {
  const Reading end = now();
  if (!begin_.is_known || !end.is_known) return false;
  const double wall = std::chrono::duration<double>(end.time - begin_.time).count();
  const double others = end.busy_seconds - begin_.busy_seconds - (end.own_seconds - begin_.own_seconds);
  // /proc/stat counts whole ticks: each CPU's may be off by one.
  return others > num_cpus() * (kShareMax * wall + 1 / ticks_per_second());
}

}  // namespace kt::coproc
