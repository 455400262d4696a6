// fastmaf_native::zero_padding_: what lies in a packed weight beyond each row's prefix is made zero, wherever it is not.
#include <algorithm>
#include <limits>

#include "checks.h"

namespace fastmaf_native {
namespace {

// Reads every number of the padding, writes only to the rows that hold another one than zero: memory that a process shares with
// others, or that two threads look through at once, is left alone where it is clean.
template <class Number, class Bits>
bool zero_padding(const Tensor& weight, const Tensor& prefix, const Tensor& tiles) {
  static_assert(sizeof(Number) == sizeof(Bits));
  const auto p = packed<const Number>("zero_padding_", weight, prefix, tiles, std::numeric_limits<int32_t>::max());
  const Bits* numbers = static_cast<const Bits*>(weight.const_data_ptr());
  Bits* writable = nullptr;
  for (long t = 0; t < p.tile_count; ++t) {
    const Tile& tile = p.tiles[t];
    for (long r = tile.row_start; r < tile.row_end; ++r) {
      const long row = tile.offset + (r - tile.row_start) * static_cast<long>(tile.width);
      const long begin = row + p.prefix[r], end = row + tile.width;
      Bits any = 0;
      for (long k = begin; k < end; ++k) any |= numbers[k];
      if (any == 0) continue;
      if (writable == nullptr) writable = static_cast<Bits*>(weight.mutable_data_ptr());
      std::fill(writable + begin, writable + end, Bits(0));
    }
  }
  return writable != nullptr;
}

bool zero_padding_(TensorList weights, TensorList prefixes, TensorList tiles) {
  TORCH_CHECK(weights.size() == prefixes.size() && weights.size() == tiles.size(),
              "zero_padding_: weights, prefixes and tiles must be as many; found ", weights.size(), ", ", prefixes.size(), ", ",
              tiles.size());
  bool changed = false;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const auto dtype = weights[i].scalar_type();
    if (dtype == at::kBFloat16)
      changed |= zero_padding<bfloat16, uint16_t>(weights[i], prefixes[i], tiles[i]);
    else if (dtype == at::kDouble)
      changed |= zero_padding<double, uint64_t>(weights[i], prefixes[i], tiles[i]);
    else
      changed |= zero_padding<float, uint32_t>(weights[i], prefixes[i], tiles[i]);
  }
  return changed;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastmaf_native, m) {
  m.def("zero_padding_(Tensor(a!)[] weights, Tensor[] prefixes, Tensor[] tiles) -> bool");
}

TORCH_LIBRARY_IMPL(fastmaf_native, CPU, m) { m.impl("zero_padding_", &zero_padding_); }

}  // namespace fastmaf_native
