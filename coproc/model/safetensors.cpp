#include "coproc/model/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <unordered_set>
#include <utility>

namespace kt::coproc {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors data is used as it lies in the file");

struct DTypeRow {
  std::string_view name;
  std::uint32_t bits;
};
// By DType.
constexpr DTypeRow kDTypes[] = {
    {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
    {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64},
};
static_assert(std::size(kDTypes) == static_cast<std::size_t>(DType::kU64) + 1);

constexpr std::size_t kDimensionsMax = 32;
constexpr std::uint64_t kSizeBytes = 8;  // Of the u64 in front of the header.

Error bad_header(const std::string& path, std::string why) {
  return bad_model("bad safetensors file " + path, std::move(why),
                   "the file is damaged or incomplete: download or copy it again");
}

// Walks the JSON token by token and accepts the grammar above, nothing else. So the first wrong token ends it, equal
// keys are seen, and a hostile header costs no more memory than its own size allows tensors.
class HeaderReader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderReader(std::uint64_t data_bytes) : data_bytes_(data_bytes) {}

  std::vector<TensorInfo> take_tensors() { return std::move(tensors_); }
  const std::string& reason() const { return reason_; }

  bool start_object(std::size_t) override {
    if (where_ == Where::kStart) {
      where_ = Where::kRoot;
    } else if (where_ == Where::kRoot) {
      where_ = tensor_.name == "__metadata__" ? Where::kMetadata : Where::kTensor;
      has_dtype_ = has_shape_ = has_offsets_ = false;
    } else {
      return unexpected("an object");
    }
    return true;
  }

  bool key(string_t& name) override {
    if (where_ == Where::kRoot) {
      tensor_ = TensorInfo{};
      tensor_.name = name;
      if (!names_.insert(name).second) return fail("the tensor appears twice");
    } else if (where_ == Where::kTensor) {
      bool* const seen = name == "dtype"          ? &has_dtype_
                         : name == "shape"        ? &has_shape_
                         : name == "data_offsets" ? &has_offsets_
                                                  : nullptr;
      if (seen == nullptr) return fail("it has an unknown field " + printable(name));
      if (std::exchange(*seen, true)) return fail("its field " + name + " appears twice");
      field_ = name;
    }
    return true;
  }

  bool string(string_t& text) override {
    if (where_ == Where::kMetadata) return true;
    if (where_ != Where::kTensor || field_ != "dtype") return unexpected("a string");
    const auto* row = std::ranges::find(kDTypes, std::string_view(text), &DTypeRow::name);
    if (row == std::end(kDTypes)) return fail("its dtype " + printable(text) + " is unknown");
    tensor_.dtype = static_cast<DType>(row - std::begin(kDTypes));
    return true;
  }

  bool start_array(std::size_t) override {
    if (where_ != Where::kTensor || field_ == "dtype") return unexpected("a list");
    where_ = Where::kList;
    list_.clear();
    return true;
  }

  bool number_unsigned(number_unsigned_t value) override {
    if (where_ != Where::kList) return unexpected("a number");
    if (list_.size() == kDimensionsMax) return fail("its " + field_ + " has more than 32 entries");
    list_.push_back(value);
    return true;
  }

  bool end_array() override {
    where_ = Where::kTensor;
    if (field_ == "shape") {
      tensor_.shape = list_;
      return true;
    }
    if (list_.size() != 2) return fail("its data_offsets have " + std::to_string(list_.size()) + " entries, not 2");
    begin_ = list_[0];
    end_ = list_[1];
    return true;
  }

  bool end_object() override {
    if (where_ == Where::kRoot) return true;
    const bool is_tensor = where_ == Where::kTensor;
    where_ = Where::kRoot;
    return !is_tensor || finish_tensor();
  }

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_integer(number_integer_t value) override {
    return unexpected("the negative number " + std::to_string(value));
  }
  bool number_float(number_float_t, const string_t& text) override { return unexpected("the number " + text); }
  bool binary(binary_t&) override { return unexpected("binary data"); }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) override {
    // `position` counts the characters read, at least one.
    reason_ = "its header is not valid JSON near byte " + std::to_string(kSizeBytes + position - 1);
    return false;
  }

 private:
  enum class Where : std::uint8_t { kStart, kRoot, kMetadata, kTensor, kList };

  bool fail(const std::string& reason) {
    reason_ = (tensor_.name.empty() ? "header: " : "tensor " + printable(tensor_.name) + ": ") + reason;
    return false;
  }
  bool unexpected(const std::string& token) {
    return fail(token + " where the format has none" + (field_.empty() ? "" : " (after field " + field_ + ")"));
  }

  bool finish_tensor() {
    if (!has_dtype_ || !has_shape_ || !has_offsets_) return fail("one of dtype, shape, data_offsets is missing");
    std::uint64_t bits = dtype_bits(tensor_.dtype);
    for (const std::uint64_t dimension : tensor_.shape) {
      if (__builtin_mul_overflow(bits, dimension, &bits)) {
        return fail("its shape " + shape_text(tensor_.shape) + " exceeds 64 bits");
      }
    }
    const std::string span = "[" + std::to_string(begin_) + "," + std::to_string(end_) + "]";
    if (begin_ > end_) return fail("its data_offsets " + span + " run backwards");
    if (end_ > data_bytes_) {
      return fail("its data_offsets " + span + " lie outside the file, which has " + std::to_string(data_bytes_) +
                  " bytes of data");
    }
    if (bits % 8 != 0 || bits / 8 != end_ - begin_) {
      return fail("its shape " + shape_text(tensor_.shape) + " of " + std::string(dtype_name(tensor_.dtype)) +
                  " needs " + std::to_string(bits / 8) + " bytes, its data_offsets " + span + " span " +
                  std::to_string(end_ - begin_));
    }
    tensor_.offset = begin_;  // From the start of the data, for now.
    tensor_.bytes = end_ - begin_;
    field_.clear();
    tensors_.push_back(std::move(tensor_));
    tensor_ = TensorInfo{};
    return true;
  }

  std::uint64_t data_bytes_;
  Where where_ = Where::kStart;
  TensorInfo tensor_;  // The one being read; its name is the last key of the root.
  std::string field_;  // The last key of the tensor being read.
  std::vector<std::uint64_t> list_;
  std::uint64_t begin_ = 0;
  std::uint64_t end_ = 0;
  bool has_dtype_ = false;
  bool has_shape_ = false;
  bool has_offsets_ = false;
  std::unordered_set<std::string> names_;
  std::vector<TensorInfo> tensors_;
  std::string reason_;
};

// Tensors in order must cover [0, data_bytes) without gap or overlap. Returns why not, or "".
std::string why_not_covered(const std::vector<TensorInfo>& tensors, std::uint64_t data_bytes) {
  std::uint64_t covered = 0;
  const TensorInfo* previous = nullptr;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.offset != covered) {
      const std::string before = previous == nullptr ? "the start of the data" : "tensor " + printable(previous->name);
      return "tensor " + printable(tensor.name) + " begins at " + std::to_string(tensor.offset) + ", but " + before +
             " ends at " + std::to_string(covered);
    }
    covered += tensor.bytes;
    previous = &tensor;
  }
  if (covered == data_bytes) return "";
  return "its tensors need " + std::to_string(covered) + " bytes of data, the file has " + std::to_string(data_bytes);
}

}  // namespace

std::string_view dtype_name(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)].name; }
std::uint32_t dtype_bits(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)].bits; }

std::string shape_text(const std::vector<std::uint64_t>& shape) {
  std::string text = "[";
  for (const std::uint64_t dimension : shape) text += (text.size() > 1 ? "," : "") + std::to_string(dimension);
  return text + "]";
}

Result<std::vector<TensorInfo>> parse_safetensors_header(std::string_view json, std::uint64_t file_bytes,
                                                         const std::string& path) {
  const std::uint64_t data_start = kSizeBytes + json.size();
  KT_CHECK(data_start <= file_bytes);
  // The parser would take a byte order mark for nothing and a zero byte for the end.
  if (!json.starts_with('{') || json.find('\0') != std::string_view::npos) {
    return bad_header(path, "its header of " + std::to_string(json.size()) + " bytes is not a JSON object");
  }
  HeaderReader reader(file_bytes - data_start);
  if (!nlohmann::json::sax_parse(json, &reader)) return bad_header(path, reader.reason());
  std::vector<TensorInfo> tensors = reader.take_tensors();
  std::ranges::sort(tensors, {}, [](const TensorInfo& tensor) { return std::pair(tensor.offset, tensor.bytes); });
  if (std::string why = why_not_covered(tensors, file_bytes - data_start); !why.empty()) {
    return bad_header(path, std::move(why));
  }
  for (TensorInfo& tensor : tensors) tensor.offset += data_start;
  return tensors;
}

Result<std::vector<TensorInfo>> read_safetensors_header(const InputFile& file) {
  if (file.size() < kSizeBytes) {
    return bad_header(file.path(), "it has " + std::to_string(file.size()) + " bytes, not even the size of its header");
  }
  char prefix[kSizeBytes];
  KT_TRY_STATUS(file.read_at(0, prefix, kSizeBytes));
  if (std::string_view(prefix, kSizeBytes) == "version ") {
    return bad_model("bad safetensors file " + file.path(),
                     "it has " + std::to_string(file.size()) + " bytes and is a git-lfs pointer, not the weights",
                     "run 'git lfs pull' in the checkpoint's directory");
  }
  const auto header_bytes = std::bit_cast<std::uint64_t>(prefix);
  if (header_bytes > kHeaderBytesMax || header_bytes > file.size() - kSizeBytes) {
    return bad_header(file.path(), "it says its header has " + std::to_string(header_bytes) + " bytes, the file has " +
                                       std::to_string(file.size()) + " (at most " + std::to_string(kHeaderBytesMax) +
                                       " are accepted)");
  }
  std::string json(header_bytes, '\0');
  KT_TRY_STATUS(file.read_at(kSizeBytes, json.data(), json.size()));
  return parse_safetensors_header(json, file.size(), file.path());
}

}  // namespace kt::coproc
