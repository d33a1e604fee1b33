#include "coproc/engine/agreement.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "coproc/engine/messages.h"
#include "coproc/engine/text.h"

namespace kt::coproc {
namespace {

using shm::Verb;

bool same_number(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

bool same_scale(double lowest, double other) {
  if (same_number(lowest, other)) return true;
  return std::abs(lowest - other) <= kScaleTolerance * std::max(std::abs(lowest), std::abs(other));
}

bool same_groups(const shm::StepGroup& a, const shm::StepGroup& b) {
  return same_number(a.lr, b.lr) && same_number(a.beta1, b.beta1) && same_number(a.beta2, b.beta2) &&
         same_number(a.eps, b.eps) && same_number(a.weight_decay, b.weight_decay) && a.decoupled == b.decoupled;
}

// NORM's mask only says counted or not; STEP's names the group.
bool same_group(Verb verb, std::uint8_t a, std::uint8_t b) {
  return verb == Verb::kNorm ? (a == shm::kFrozen) == (b == shm::kFrozen) : a == b;
}

// The common case, decided without making any text.
bool identical(const RankedRequest& a, const RankedRequest& b) {
  const shm::Request& left = a.pending->request;
  const shm::Request& right = b.pending->request;
  if (left.verb != right.verb || a.adapter_id != b.adapter_id || a.layer != b.layer) return false;
  const auto& mask_a = a.pending->group_of;
  const auto& mask_b = b.pending->group_of;
  const auto same = [&](std::uint8_t x, std::uint8_t y) { return same_group(left.verb, x, y); };
  if (!std::equal(mask_a.begin(), mask_a.end(), mask_b.begin(), mask_b.end(), same)) return false;
  if (left.verb != Verb::kStep) return true;
  const shm::StepHeader& header_a = *a.pending->header;
  const shm::StepHeader& header_b = *b.pending->header;
  return left.step == right.step && header_a.num_groups == header_b.num_groups &&
         std::equal(std::begin(header_a.groups), std::end(header_a.groups), std::begin(header_b.groups), same_groups) &&
         same_scale(header_a.scale, header_b.scale);
}

void append_groups(std::vector<Field>& fields, const shm::StepHeader& header) {
  fields.push_back({"the number of groups", "STEP with " + std::to_string(header.num_groups) + " groups"});
  for (std::size_t i = 0; i < header.num_groups; ++i) {
    const shm::StepGroup& group = header.groups[i];
    const auto add = [&](const char* name, const std::string& value) {
      const std::string where = " in group " + std::to_string(i);
      std::string phrase = "STEP with ";
      phrase.append(name).append(" ").append(value).append(where);
      fields.push_back({name + where, std::move(phrase)});
    };
    add("lr", number_text(group.lr));
    add("beta1", number_text(group.beta1));
    add("beta2", number_text(group.beta2));
    add("eps", number_text(group.eps));
    add("weight_decay", number_text(group.weight_decay));
    add("decoupled", std::to_string(group.decoupled));
  }
}

void append_mask(std::vector<Field>& fields, Verb verb, const std::vector<std::uint8_t>& group_of) {
  for (std::size_t i = 0; i < group_of.size(); ++i) {
    const std::string where =
        std::string(adapter_tensor_name(static_cast<shm::AdapterTensor>(i % shm::kNumAdapterTensors))) + " of layer " +
        std::to_string(i / shm::kNumAdapterTensors);
    std::string value = "frozen";
    if (group_of[i] != shm::kFrozen) {
      value = verb == Verb::kNorm ? "counted" : "in group " + std::to_string(group_of[i]);
    }
    std::string phrase = shm::verb_name(verb);
    phrase.append(" with ").append(where).append(" ").append(value);
    fields.push_back({"the group of " + where, std::move(phrase)});
  }
}

Offer describe_offer(const RankedRequest& ranked) {
  const shm::Request& request = ranked.pending->request;
  const std::string verb = shm::verb_name(request.verb);
  Offer offer{ranked.rank, {}};
  offer.fields.push_back({"the verb", verb});
  offer.fields.push_back({"the adapter", verb + " of adapter " + std::to_string(ranked.adapter_id)});
  if (request.verb == Verb::kBackward) {
    offer.fields.push_back({"the layer", verb + " of layer " + std::to_string(ranked.layer)});
  }
  if (request.verb == Verb::kStep) {
    offer.fields.push_back({"the step", verb + " at step " + std::to_string(request.step)});
    append_groups(offer.fields, *ranked.pending->header);
  }
  append_mask(offer.fields, request.verb, ranked.pending->group_of);
  return offer;
}

std::string half_text(const shm::HalfSpec& half) {
  return "r " + std::to_string(half.r) + " and scaling " + number_text(half.scaling);
}

Offer describe_command(const RankedCommand& ranked) {
  Offer offer{ranked.rank, {}};
  const std::string name = command_name(*ranked.command);
  offer.fields.push_back({"the command", name});
  if (const auto* create = std::get_if<CreateAdapter>(ranked.command)) {
    offer.fields.push_back({"the adapter", name + " of adapter " + std::to_string(create->adapter_id)});
    offer.fields.push_back({"the layers", name + " for layers " + join_ranks(create->layers)});
    offer.fields.push_back({"gate_up", name + " with gate_up " + half_text(create->spec.gate_up)});
    offer.fields.push_back({"shared_a", name + (create->spec.shared_a ? " with shared_a" : " without shared_a")});
    offer.fields.push_back({"down", name + " with down " + half_text(create->spec.down)});
  } else if (const auto* remove = std::get_if<DeleteAdapter>(ranked.command)) {
    offer.fields.push_back({"the adapter", name + " of adapter " + std::to_string(remove->adapter_id)});
  }
  return offer;
}

}  // namespace

std::optional<Disagreement> first_disagreement(std::span<const Offer> offers) {
  constexpr std::size_t kNumNamedMax = 6;
  const Offer& lowest = offers.front();
  for (std::size_t i = 0; i < lowest.fields.size(); ++i) {
    std::string others;
    std::size_t num_different = 0;
    for (const Offer& offer : offers) {
      if (i < offer.fields.size() && offer.fields[i].phrase == lowest.fields[i].phrase) continue;
      if (++num_different > kNumNamedMax) continue;
      const std::string phrase = i < offer.fields.size() ? offer.fields[i].phrase : "something else";
      others += ", rank " + std::to_string(offer.rank) + " for " + phrase;
    }
    if (num_different == 0) continue;
    if (num_different > kNumNamedMax) {
      others += ", and " + std::to_string(num_different - kNumNamedMax) + " more ranks differ";
    }
    return Disagreement{lowest.fields[i].name,
                        "rank " + std::to_string(lowest.rank) + " asks for " + lowest.fields[i].phrase + others};
  }
  return std::nullopt;
}

std::optional<Disagreement> ring_disagreement(std::span<const RankedRequest> requests) {
  const auto differs = [&](const RankedRequest& other) { return !identical(requests.front(), other); };
  if (std::none_of(requests.begin(), requests.end(), differs)) return std::nullopt;
  std::vector<Offer> offers;
  for (const RankedRequest& request : requests) offers.push_back(describe_offer(request));
  if (auto found = first_disagreement(offers)) return found;
  // Everything else agrees, so all are STEPs and the scale is what differs.
  const double lowest_scale = requests.front().pending->header->scale;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const double scale = requests[i].pending->header->scale;
    const double shown = same_scale(lowest_scale, scale) ? lowest_scale : scale;
    offers[i].fields = {{"scale", "STEP with scale " + number_text(shown)}};
  }
  return first_disagreement(offers);
}

std::optional<Disagreement> command_disagreement(std::span<const RankedCommand> commands) {
  std::vector<Offer> offers;
  for (const RankedCommand& command : commands) offers.push_back(describe_command(command));
  return first_disagreement(offers);
}

}  // namespace kt::coproc
