#include "tests/coproc/engine/owners_fixture.h"

#include <stdexcept>

#include "shm/doorbell.h"

namespace kt::test {

Owners::Owners(bool deterministic, std::uint64_t activation_bytes_max, std::uint32_t batch_tokens_max)
    : heads(dims, registry, accounting, deterministic),
      activations(dims, registry, activation_bytes_max),
      batches(dims, registry, heads, activations, compute, accounting, batch_tokens_max) {
  registry.add_listener(joins);
  registry.add_listener(commands);
}

Rank& Owners::open() {
  const auto session_id = static_cast<std::uint32_t>(ranks.size() + 1);
  auto segment = shm::Segment::create(session_id, shm::kArenaBytesMin);
  auto doorbell = shm::create_doorbell();
  if (!segment.ok() || !doorbell.ok()) throw std::runtime_error("no segment or doorbell");
  ranks.push_back(
      std::make_unique<Rank>(UniqueFd(::dup(segment.value().fd())), UniqueFd(::dup(doorbell.value().get())), shape));
  ranks.back()->session_id = session_id;
  const Status opened =
      registry.open({session_id, 1000 + session_id, "label", std::move(segment).value(), std::move(doorbell).value()});
  if (!opened.ok()) throw std::runtime_error(opened.error().text());
  return *ranks.back();
}

void Owners::create_adapter(const Rank& rank) {
  const Told told;
  commands.ask(session(rank), coproc::CreateAdapter{kAdapter, kMoeLayers, default_spec()}, told.on_done(), 1);
  if (told.code() != ErrorCode::kOk) throw std::runtime_error("no adapter");
}

coproc::Job& Owners::join_all() {
  std::vector<coproc::Registry::Place> members;
  for (const auto& rank : ranks) {
    create_adapter(*rank);
    members.push_back({&session(*rank), static_cast<std::uint32_t>(members.size())});
  }
  return registry.merge(join_request(0, static_cast<std::uint32_t>(ranks.size()), "job"), kTimeoutNs, members);
}

void Owners::receive_and_advance() {
  registry.any_session([&](coproc::Session& session) { return intake.receive(session); });
  registry.any_session([&](coproc::Session& session) { return heads.advance(session); });
}

coproc::OnDone Told::on_done() const {
  return [answer = answer](const Status& status) {
    *answer = status.ok() ? Host::Answer(coproc::JoinAnswer{}) : Host::Answer(status.error());
  };
}

coproc::OnJoined Told::on_joined() const {
  return [answer = answer](Host::Answer joined) { *answer = std::move(joined); };
}

}  // namespace kt::test
