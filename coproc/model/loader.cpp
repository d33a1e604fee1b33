#include "coproc/model/loader.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

namespace kt::coproc {
namespace {

struct Item {
  std::uint32_t moe_index;
  std::uint32_t expert;
};

// All experts, in the order in which their bytes lie on disk.
std::vector<Item> items_in_file_order(const Checkpoint& checkpoint) {
  const ModelConfig& config = checkpoint.config();
  std::vector<Item> items;
  items.reserve(config.moe_layers.size() * config.num_experts);
  for (std::uint32_t moe_index = 0; moe_index < config.moe_layers.size(); ++moe_index) {
    for (std::uint32_t expert = 0; expert < config.num_experts; ++expert) items.push_back({moe_index, expert});
  }
  std::ranges::sort(items, {}, [&](const Item& item) {
    const ExpertSource source = checkpoint.expert(item.moe_index, item.expert);
    const auto place = [](const MatrixSource& matrix) { return std::pair(matrix.file, matrix.offset); };
    return std::min({place(source.gate), place(source.up), place(source.down)});
  });
  return items;
}

// Room for one expert: its three matrices as elements, and one matrix as it lies in the file.
struct Buffers {
  using Bytes = std::unique_ptr<std::byte[]>;
  Bytes elements[3];
  Bytes raw;
};

class Loader {
 public:
  Loader(const Checkpoint& checkpoint, ElementType element, ExpertSink& sink, LoadProgress& progress)
      : checkpoint_(checkpoint),
        element_(element),
        sink_(sink),
        progress_(progress),
        items_(items_in_file_order(checkpoint)) {}

  Status run(std::uint32_t num_threads) {
    progress_.bytes_total.store(checkpoint_.expert_bytes());
    num_threads_ = static_cast<std::uint32_t>(std::clamp<std::size_t>(num_threads, 1, items_.size()));
    std::vector<Buffers> buffers(num_threads_);
    for (Buffers& one : buffers) KT_TRY_STATUS(allocate(one));
    {
      std::vector<std::jthread> threads;
      threads.reserve(buffers.size());
      for (Buffers& one : buffers) threads.emplace_back([this, &one] { work(one); });
    }
    if (error_) return std::move(*error_);
    return ok_status();
  }

 private:
  Status allocate(Buffers& buffers) const {
    const ModelConfig& config = checkpoint_.config();
    const std::uint64_t elements = std::uint64_t{config.intermediate_size} * config.hidden_size;
    const std::uint64_t bytes = elements * element_bytes(element_);
    for (Buffers::Bytes& matrix : buffers.elements) matrix.reset(new (std::nothrow) std::byte[bytes]);
    buffers.raw.reset(new (std::nothrow) std::byte[elements * sizeof(float)]);
    if (buffers.elements[0] && buffers.elements[1] && buffers.elements[2] && buffers.raw) return ok_status();
    return Error{ErrorCode::kNoResources, "no memory to load " + config.path,
                 "each of " + std::to_string(num_threads_) + " loader threads needs " +
                     std::to_string(3 * bytes + elements * sizeof(float)) + " bytes of buffers",
                 "free memory on this machine"};
  }

  void work(const Buffers& buffers) {
    while (!stop_.load(std::memory_order_relaxed)) {
      const std::size_t next = next_item_.fetch_add(1, std::memory_order_relaxed);
      if (next >= items_.size()) return;
      if (progress_.cancel.load()) {
        return fail(Error{ErrorCode::kCoprocDied, "loading of " + checkpoint_.config().path + " was cancelled",
                          std::to_string(progress_.bytes_done.load()) + " of " +
                              std::to_string(progress_.bytes_total.load()) + " bytes had been read",
                          "start the daemon again"});
      }
      if (Status status = load(next, buffers); !status.ok()) return fail(std::move(status).error());
    }
  }

  Status load(std::size_t number, const Buffers& buffers) {
    // While this thread reads and packs, the disk already fetches what this round's threads read next.
    if (number + num_threads_ < items_.size()) {
      const Item& later = items_[number + num_threads_];
      const ExpertSource source = checkpoint_.expert(later.moe_index, later.expert);
      for (const MatrixSource& matrix : {source.gate, source.up, source.down}) {
        checkpoint_.files()[matrix.file].will_need(matrix.offset, matrix.bytes());
      }
    }
    const Item& item = items_[number];
    const ExpertSource source = checkpoint_.expert(item.moe_index, item.expert);
    KT_TRY_STATUS(read(source.gate, buffers, buffers.elements[0].get()));
    KT_TRY_STATUS(read(source.up, buffers, buffers.elements[1].get()));
    KT_TRY_STATUS(read(source.down, buffers, buffers.elements[2].get()));
    sink_.expert(item.moe_index, item.expert, buffers.elements[0].get(), buffers.elements[1].get(),
                 buffers.elements[2].get());
    return ok_status();
  }

  Status read(const MatrixSource& matrix, const Buffers& buffers, std::byte* out) {
    const bool convert = needs_conversion(matrix.dtype, element_);
    std::byte* target = convert ? buffers.raw.get() : out;
    KT_TRY_STATUS(checkpoint_.files()[matrix.file].read_at(matrix.offset, target, matrix.bytes()));
    if (convert) convert_elements(matrix.dtype, target, element_, out, matrix.elements());
    progress_.bytes_done.fetch_add(matrix.bytes(), std::memory_order_relaxed);
    return ok_status();
  }

  // The first error counts; the other threads stop after the expert they are at.
  void fail(Error error) {
    const std::scoped_lock lock(error_mutex_);
    if (!error_) error_ = std::move(error);
    stop_.store(true, std::memory_order_relaxed);
  }

  const Checkpoint& checkpoint_;
  const ElementType element_;
  ExpertSink& sink_;
  LoadProgress& progress_;
  const std::vector<Item> items_;
  std::uint32_t num_threads_ = 1;
  std::atomic<std::size_t> next_item_{0};
  std::atomic<bool> stop_{false};
  std::mutex error_mutex_;
  std::optional<Error> error_;
};

}  // namespace

Status load_experts(const Checkpoint& checkpoint, ElementType element, ExpertSink& sink, LoadProgress& progress,
                    std::uint32_t num_threads) {
  return Loader(checkpoint, element, sink, progress).run(num_threads);
}

}  // namespace kt::coproc
