#include "shm/model_card.h"

#include <algorithm>
#include <utility>

#include "shm/text.h"

namespace kt::shm {
namespace {

using nlohmann::json;

// Every fact: its key, its member, and the greatest value that a number may have. The least is 1.
template <class Card, class Visit>
void each_fact(Card& card, Visit& visit) {
  visit("path", card.path);
  visit("architecture", card.architecture);
  visit("fingerprint", card.fingerprint);
  visit("weight_format", card.weight_format);
  visit("num_layers", card.num_layers, kLayersMax);
  visit("num_experts", card.num_experts, kExpertsMax);
  visit("top_k", card.top_k, kTopKMax);
  visit("hidden_size", card.hidden_size, kHiddenSizeMax);
  visit("intermediate_size", card.intermediate_size, kIntermediateSizeMax);
  visit("moe_layers", card.moe_layers);
  visit("activation", card.activation);
  visit("expert_names", card.expert_names);
}

template <class Names, class Visit>
void each_name(Names& names, Visit visit) {
  visit("prefixes", names.prefixes);
  visit("projections", names.projections);
  visit("fused", names.fused);
}

struct Writer {
  json object = json::object();

  void operator()(const char* key, const std::string& text) { object[key] = valid_utf8(text); }
  void operator()(const char* key, std::uint32_t number, std::uint32_t) { object[key] = number; }
  void operator()(const char* key, const std::vector<std::uint32_t>& list) { object[key] = list; }
  void operator()(const char* key, const Activation& activation) {
    object[key] = find_activation(activation.kind)->name;
    if (activation.limit != 0) object[std::string(key) + "_limit"] = activation.limit;
  }
  void operator()(const char* key, const ExpertNames& names) {
    json& to = object[key];
    to["path"] = valid_utf8(names.path);
    each_name(names, [&](const char* name, const std::vector<std::string>& list) {
      to[name] = json::array();
      for (const std::string& text : list) to[name].push_back(valid_utf8(text));
    });
  }
};

std::string quoted(const json& value) {
  constexpr std::size_t kBytesMax = 80;
  return std::string(cut_utf8(one_line(value.dump(-1, ' ', false, json::error_handler_t::replace)), kBytesMax));
}

bool is_number(const json& value, std::uint64_t max) {
  if (!value.is_number_integer() || value < 0) return false;
  return value.get<std::uint64_t>() <= max;
}

class Reader {
 public:
  explicit Reader(const json& object) : object_(object) {}
  const std::string& why() const { return why_; }

  void operator()(const char* key, std::string& text) {
    const json* value = find(key);
    if (value != nullptr && value->is_string()) {
      text = value->get<std::string>();
    } else {
      refuse(key, value);
    }
  }
  void operator()(const char* key, std::uint32_t& number, std::uint32_t max) {
    const json* value = find(key);
    if (value != nullptr && is_number(*value, max) && *value != 0) {
      number = value->get<std::uint32_t>();
    } else {
      refuse(key, value);
    }
  }
  void operator()(const char* key, std::vector<std::uint32_t>& list) {
    const json* value = find(key);
    const auto is_layer = [](const json& layer) { return is_number(layer, kLayersMax); };
    if (value != nullptr && value->is_array() && !value->empty() && std::ranges::all_of(*value, is_layer)) {
      list = value->get<std::vector<std::uint32_t>>();
    } else {
      refuse(key, value);
    }
  }
  void operator()(const char* key, Activation& activation) {
    const json* value = find(key);
    if (value == nullptr) return;
    const ActivationRow* row = value->is_string() ? find_activation(value->get<std::string>()) : nullptr;
    if (row == nullptr) return refuse(key, value);
    activation.kind = row->kind;
    const std::string limit_key = std::string(key) + "_limit";
    const json* limit = find(limit_key.c_str());
    if (limit != nullptr && !limit->is_number()) return refuse(limit_key.c_str(), limit);
    activation.limit = limit == nullptr ? 0 : limit->get<float>();
    if (!is_valid(activation)) refuse(limit_key.c_str(), limit);
  }
  void operator()(const char* key, ExpertNames& names) {
    const json* value = find(key);
    if (value == nullptr) return;
    if (!value->is_object()) return refuse(key, value);
    const auto is_name = [](const json& text) {
      return text.is_string() && text.get_ref<const std::string&>().size() <= kExpertNameBytesMax;
    };
    const auto member = [&](const char* name) { return value->contains(name) ? (*value)[name] : json(); };
    const json path = member("path");
    if (!is_name(path)) return refuse(key, value);
    names.path = path.get<std::string>();
    each_name(names, [&](const char* name, std::vector<std::string>& list) {
      const json from = member(name);
      if (!from.is_array() || from.size() > kExpertNamesMax || !std::ranges::all_of(from, is_name)) {
        return refuse(key, value);
      }
      list = from.get<std::vector<std::string>>();
    });
    const bool is_whole = !names.prefixes.empty() && names.projections.size() == 3 && names.fused.size() == 2;
    if (names != ExpertNames{} && !is_whole) refuse(key, value);
  }

 private:
  const json* find(const char* key) const {
    const auto found = object_.find(key);
    return found == object_.end() ? nullptr : &*found;
  }
  // The first one counts.
  void refuse(const char* key, const json* value) {
    if (!why_.empty()) return;
    why_ = std::string(key) + (value == nullptr ? " is missing" : " is " + quoted(*value));
  }

  const json& object_;
  std::string why_;
};

Error strange(std::string why) {
  return Error{ErrorCode::kVersionMismatch, "the description of the daemon's model is not understood", std::move(why),
               "run client and daemon of the same kt-coproc release"};
}

}  // namespace

json to_json(const ModelCard& card) {
  Writer writer;
  each_fact(card, writer);
  return std::move(writer.object);
}

Result<ModelCard> parse_model_card(const json& object) {
  if (!object.is_object()) return strange("it is no object");
  ModelCard card;
  Reader reader(object);
  each_fact(card, reader);
  if (!reader.why().empty()) return strange(reader.why());
  if (card.top_k > card.num_experts) {
    return strange("top_k is " + std::to_string(card.top_k) + " of " + std::to_string(card.num_experts) + " experts");
  }
  if (!std::ranges::is_sorted(card.moe_layers, std::ranges::less_equal{}) ||
      card.moe_layers.back() >= card.num_layers) {
    return strange("moe_layers is no ascending list of layers below " + std::to_string(card.num_layers));
  }
  return card;
}

}  // namespace kt::shm
