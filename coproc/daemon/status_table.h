// `kt-coproc status` for people.
#pragma once
#include <nlohmann/json.hpp>
#include <string>

namespace kt::coproc {

// status: the object of `status --json`. Several lines, the last one ended too.
std::string status_table(const nlohmann::json& status);

}  // namespace kt::coproc
