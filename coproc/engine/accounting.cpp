#include "coproc/engine/accounting.h"

#include <algorithm>

#include "coproc/engine/job.h"
#include "coproc/engine/text.h"

namespace kt::coproc {
namespace {

using shm::Verb;

constexpr std::uint64_t kSampleNs = 100'000'000;
constexpr std::uint64_t kWindowNs = 1'000'000'000;

void bump(shm::Counter& counter, std::uint64_t by = 1) { counter.fetch_add(by, std::memory_order_relaxed); }
std::uint64_t get(const shm::Counter& counter) { return counter.load(std::memory_order_relaxed); }
template <class Atomic, class Value>
void set(Atomic& atomic, Value value) {
  atomic.store(value, std::memory_order_relaxed);
}

void reset(shm::Totals& totals) {
  for (shm::Counter* counter :
       {&totals.forward_requests, &totals.backward_requests, &totals.fetch_requests, &totals.forward_layer_tokens,
        &totals.backward_layer_tokens, &totals.steps, &totals.batches, &totals.errors, &totals.sessions_attached,
        &totals.sessions_rejected}) {
    set(*counter, 0u);
  }
}

void count_request(shm::Totals& totals, Verb verb, std::uint32_t num_tokens, bool ok) {
  if (!ok) {
    bump(totals.errors);
  } else if (verb == Verb::kForward) {
    bump(totals.forward_requests);
    bump(totals.forward_layer_tokens, num_tokens);
  } else if (verb == Verb::kBackward) {
    bump(totals.backward_requests);
    bump(totals.backward_layer_tokens, num_tokens);
  } else if (verb == Verb::kFetch) {
    bump(totals.fetch_requests);
  }
}

std::uint32_t state_of(Verb head) {
  const auto state = [&] {
    switch (head) {
      case Verb::kNone:
        return shm::RankState::kIdle;
      case Verb::kForward:
        return shm::RankState::kForward;
      case Verb::kBackward:
        return shm::RankState::kBackward;
      default:
        return shm::is_collective(head) ? shm::RankState::kCollective : shm::RankState::kOther;
    }
  };
  return static_cast<std::uint32_t>(state());
}

std::uint64_t waited_until(const RankAccount& account, std::uint64_t now_ns) {
  const bool waits = account.in_flight > 0 && now_ns > account.waiting_since_ns;
  return account.waited_ns + (waits ? now_ns - account.waiting_since_ns : 0);
}

}  // namespace

Accounting::Accounting(shm::StatusPage& page, std::uint32_t num_moe_layers, const WorkerPool& pool)
    : page_(page), num_moe_layers_(std::max(num_moe_layers, 1u)), pool_(pool) {}

bool Accounting::open_rank(RankAccount& account, std::uint64_t now_ns) {
  const auto is_free = [](const shm::RankRow& row) { return row.used.load(std::memory_order_relaxed) == 0; };
  const auto row = std::find_if(std::begin(page_.ranks), std::end(page_.ranks), is_free);
  if (row == std::end(page_.ranks)) return false;
  reset(row->totals);
  for (shm::Counter& count : row->latency.counts) set(count, 0u);
  set(row->state, state_of(Verb::kNone));
  set(row->in_flight, 0u);
  set(row->waiting_ratio, 0.0);
  account.row = &*row;
  account.waiting_since_ns = now_ns;
  account.samples.assign(samples_.size(), 0);
  ranks_.push_back(&account);
  bump(page_.totals.sessions_attached);
  return true;
}

void Accounting::describe_rank(const RankAccount& account, std::uint32_t session_id, std::uint32_t pid,
                               std::uint32_t rank, const std::string& job_id) {
  shm::RankRow& row = *account.row;
  const shm::RowWriter writer(row.version);
  set(row.rank, rank);
  set(row.pid, pid);
  set(row.session_id, session_id);
  shm::set_text(row.job_id, sizeof row.job_id, job_id);
  set(row.used, 1u);
}

void Accounting::close_rank(RankAccount& account) {
  const shm::RowWriter writer(account.row->version);
  set(account.row->used, 0u);
  std::erase(ranks_, &account);
  account.row = nullptr;
}

void Accounting::reject_session() { bump(page_.totals.sessions_rejected); }

void Accounting::publish_job(Job& job) {
  if (job.row == nullptr) {
    const auto is_free = [](const shm::JobRow& row) { return row.used.load(std::memory_order_relaxed) == 0; };
    const auto row = std::find_if(std::begin(page_.jobs), std::end(page_.jobs), is_free);
    if (row == std::end(page_.jobs)) return;
    job.row = &*row;
  }
  shm::JobRow& row = *job.row;
  const shm::RowWriter writer(row.version);
  set(row.world_size, job.world_size);
  set(row.num_members, static_cast<std::uint32_t>(job.members.size()));
  shm::set_text(row.job_id, sizeof row.job_id, job.id);
  shm::set_text(row.name, sizeof row.name, job.name);
  shm::set_text(row.members, sizeof row.members, join_ranks(job.ranks()));
  set(row.failed, job.failure ? 1u : 0u);
  set(row.step, job.step);
  set(row.used, 1u);
}

void Accounting::close_job(Job& job) {
  if (job.row == nullptr) return;
  const shm::RowWriter writer(job.row->version);
  set(job.row->used, 0u);
  job.row = nullptr;
}

void Accounting::received(RankAccount& account, std::uint64_t now_ns) {
  if (at_rest_) {
    // Rest may have lasted for hours: the window starts anew, before anything is counted.
    at_rest_ = false;
    samples_.clear();
    for (RankAccount* rank : ranks_) rank->samples.clear();
    take_sample(now_ns);
  }
  if (account.in_flight++ == 0) account.waiting_since_ns = now_ns;
  set(account.row->in_flight, account.in_flight);
}

void Accounting::answered(RankAccount& account, Verb verb, std::uint32_t num_tokens, bool ok, std::uint64_t received_ns,
                          std::uint64_t now_ns) {
  const std::uint64_t waited_ns = waited_until(account, now_ns);
  if (--account.in_flight == 0) account.waited_ns = waited_ns;
  set(account.row->in_flight, account.in_flight);
  count_request(page_.totals, verb, num_tokens, ok);
  count_request(account.row->totals, verb, num_tokens, ok);
  shm::record_latency(account.row->latency, now_ns > received_ns ? now_ns - received_ns : 0);
}

void Accounting::show_state(const RankAccount& account, Verb head) { set(account.row->state, state_of(head)); }

void Accounting::count_batch(std::uint64_t num_tokens) {
  bump(page_.totals.batches);
  batch_tokens_ += num_tokens;
}

void Accounting::count_step() { bump(page_.totals.steps); }

void Accounting::set_memory(const MemoryBytes& bytes) {
  set(page_.bytes_adapters, bytes.adapters);
  set(page_.bytes_gradients, bytes.gradients);
  set(page_.bytes_optimizer, bytes.optimizer);
  set(page_.bytes_activations, bytes.activations);
  set(page_.bytes_arenas, bytes.arenas);
}

bool Accounting::tick(std::uint64_t now_ns) {
  if (at_rest_ || now_ns < samples_.back().at_ns + kSampleNs) return false;
  take_sample(now_ns);
  // Keep one sample that is at least a second old, so that the window is never shorter than that for long.
  while (samples_.size() > 2 && samples_[1].at_ns + kWindowNs <= now_ns) {
    samples_.pop_front();
    for (RankAccount* account : ranks_) account->samples.pop_front();
  }
  publish_rates();
  return true;
}

void Accounting::take_sample(std::uint64_t now_ns) {
  samples_.push_back(Sample{now_ns, get(page_.totals.forward_layer_tokens), get(page_.totals.backward_layer_tokens),
                            batch_tokens_, get(page_.totals.batches), pool_.busy_ns()});
  for (RankAccount* account : ranks_) account->samples.push_back(waited_until(*account, now_ns));
}

void Accounting::publish_rates() {
  const Sample& first = samples_.front();
  const Sample& last = samples_.back();
  if (last.at_ns == first.at_ns) return;
  const auto ns = static_cast<double>(last.at_ns - first.at_ns);
  const auto per_second = [&](std::uint64_t from, std::uint64_t to) {
    return static_cast<double>(to - from) * 1e9 / ns;
  };
  const auto batches = static_cast<double>(last.batches - first.batches);
  const auto batch_tokens = static_cast<double>(last.batch_tokens - first.batch_tokens);
  const double busy = static_cast<double>(last.busy_ns - first.busy_ns) / ns / pool_.num_workers();
  // A token passes all MoE layers: what users count is a token per whole pass.
  set(page_.forward_tokens_per_second, per_second(first.forward_tokens, last.forward_tokens) / num_moe_layers_);
  set(page_.backward_tokens_per_second, per_second(first.backward_tokens, last.backward_tokens) / num_moe_layers_);
  set(page_.worker_busy_ratio, std::clamp(busy, 0.0, 1.0));
  set(page_.tokens_per_batch, batches > 0 ? batch_tokens / batches : 0.0);

  bool waiting = false;
  for (RankAccount* account : ranks_) {
    const double waited = static_cast<double>(account->samples.back() - account->samples.front()) / ns;
    set(account->row->waiting_ratio, std::clamp(waited, 0.0, 1.0));
    waiting |= waited > 0 || account->in_flight > 0;
  }
  at_rest_ = batches == 0 && last.busy_ns == first.busy_ns && !waiting;
}

}  // namespace kt::coproc
