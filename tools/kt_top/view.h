// What kt-top shows, as text: a pure function of the object of `kt-coproc status --json`, so that tests read the
// screen.
#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace kt::top {

// "1234 B", "57.1 GB": decimal units, three significant digits.
std::string format_bytes(double bytes);
// "12.3k": counts and rates, three significant digits.
std::string format_count(double count);
// "85 µs", "1.20 ms", "3.40 s".
std::string format_seconds(double seconds);
// "12 s", "4 min 10 s", "2 h 05 min", "3 d 4 h".
std::string format_uptime(double seconds);

// At most `rows` lines of at most `columns` characters each. What is absent in `status` is shown as "-". Rank and job
// rows that do not fit are counted in the last line ("… 3 more").
std::vector<std::string> render(const nlohmann::json& status, int columns, int rows);

}  // namespace kt::top
