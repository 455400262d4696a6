// What every op checks before it hands pointers to a kernel, how it finds the types, and where large outputs lie; includes torch.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace fastmaf_native {

using at::Tensor;
using at::TensorList;
using fastmaf::bfloat16;
using fastmaf::Bound;
using fastmaf::Packed;
using fastmaf::Tile;

inline long threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK(t.device().is_cpu(), op, ": ", name, " must be on the CPU; found ", t.device());
  TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous; found strides ", t.strides());
}

inline void check(const char* op, const char* name, const Tensor& t, at::ScalarType dtype, at::IntArrayRef shape) {
  check_cpu(op, name, t);
  TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype, "; found ", t.scalar_type());
  TORCH_CHECK(t.sizes() == shape, op, ": ", name, " must have shape ", shape, "; found ", t.sizes());
}

inline void check_dtype(const char* op, const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, op,
              ": the native kernels take float32 and float64; found ", x.scalar_type());
}

inline bool is_relu(const char* op, c10::string_view activation) {
  TORCH_CHECK(activation == "relu" || activation == "identity", op, ": activation must be 'relu' or 'identity'; found '",
              activation, "'");
  return activation == "relu";
}

// Checks that tiles, prefix and storage fit one another: a kernel trusts them.
template <class W>
Packed<W> packed(const char* op, const Tensor& weight, const Tensor& prefix, const Tensor& tiles, long columns) {
  using Number = std::remove_const_t<W>;
  const auto dtype = sizeof(Number) == 2 ? at::kBFloat16 : sizeof(Number) == 4 ? at::kFloat : at::kDouble;
  check_cpu(op, "weight", weight);
  TORCH_CHECK(weight.scalar_type() == dtype && weight.dim() == 1, op, ": weight must be packed, 1-D and ", dtype, "; found ",
              weight.scalar_type(), " ", weight.sizes());
  check_cpu(op, "tiles", tiles);
  TORCH_CHECK(tiles.scalar_type() == at::kInt && tiles.dim() == 2 && tiles.size(1) == 4 && tiles.size(0) > 0, op,
              ": tiles must be int32 [T, 4]; found ", tiles.scalar_type(), " ", tiles.sizes());
  const auto* table = reinterpret_cast<const Tile*>(tiles.const_data_ptr<int32_t>());
  const long count = tiles.size(0), rows = table[count - 1].row_end;
  check(op, "prefix", prefix, at::kLong, {rows});
  const auto* sees = prefix.const_data_ptr<int64_t>();
  long row = 0, offset = 0;
  for (long t = 0; t < count; ++t) {
    const Tile& tile = table[t];
    TORCH_CHECK(tile.row_start == row && tile.row_end > row && tile.row_end <= rows && tile.offset == offset && tile.width >= 0 &&
                    tile.width <= columns && sees[tile.row_end - 1] <= tile.width && sees[tile.row_start] >= 0,
                op, ": tile ", t, " (rows ", tile.row_start, "..", tile.row_end, ", width ", tile.width, ", offset ", tile.offset,
                ") does not continue a staircase of ", columns, " columns at row ", row, ", offset ", offset,
                ": the layout belongs to another weight");
    row = tile.row_end;
    offset += static_cast<long>(tile.row_end - tile.row_start) * tile.width;
  }
  TORCH_CHECK(weight.numel() == offset, op, ": weight must hold ", offset, " numbers for these tiles; found ", weight.numel());
  W* data;
  if constexpr (std::is_const_v<W>)
    data = static_cast<W*>(weight.const_data_ptr());
  else
    data = static_cast<W*>(weight.mutable_data_ptr());
  return {data, table, count, sees, rows, columns};
}

inline long batch(const char* op, const char* name, const Tensor& x) {
  TORCH_CHECK(x.dim() == 2, op, ": ", name, " must be [N, features]; found ", x.sizes());
  check_cpu(op, name, x);
  return x.size(0);
}

// Calls body(T{}) for the dtype of x.
template <class Body>
auto for_dtype(const char* op, const Tensor& x, Body&& body) {
  check_dtype(op, x);
  return x.scalar_type() == at::kDouble ? body(double{}) : body(float{});
}

// Calls body(T{}, W{}): weights are of the dtype of x, or bfloat16 beside float32.
template <class Body>
auto for_dtypes(const char* op, const Tensor& x, const Tensor& weight, Body&& body) {
  check_dtype(op, x);
  if (weight.scalar_type() == at::kBFloat16) {
    TORCH_CHECK(x.scalar_type() == at::kFloat, op, ": bfloat16 weights go with float32 activations; found ", x.scalar_type());
    return body(float{}, bfloat16{});
  }
  return x.scalar_type() == at::kDouble ? body(double{}, double{}) : body(float{}, float{});
}

// Adam's scalars, in the order in which fastmaf_native's schemas take them.
inline constexpr long kAdamNumbers = 9;
template <class T>
fastmaf::AdamStep<T> adam_step(const char* op, const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                               at::ArrayRef<double> a) {
  check(op, "exp_avg", exp_avg, weight.scalar_type(), weight.sizes());
  check(op, "exp_avg_sq", exp_avg_sq, weight.scalar_type(), weight.sizes());
  TORCH_CHECK(a.size() == kAdamNumbers, op, ": expected ", kAdamNumbers, " numbers of Adam; found ", a.size());
  return {weight.mutable_data_ptr<T>(), exp_avg.mutable_data_ptr<T>(), exp_avg_sq.mutable_data_ptr<T>(),
          a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7] != 0, a[8] != 0};
}

// Memory that starts and ends with a huge page, which the system is asked to back it with: streaming it then meets fewer page walks
// (within the memory of an allocator some 15 % of such a tensor would be left out).
inline Tensor empty_on_huge_pages(int64_t numel, at::ScalarType dtype) {
  constexpr std::size_t kHuge = std::size_t{1} << 21;
  TORCH_CHECK(numel >= 0, "empty_on_huge_pages: numel must not be negative; found ", numel);
  const auto options = at::TensorOptions().dtype(dtype);
  const std::size_t needed = static_cast<std::size_t>(numel) * at::elementSize(dtype);
  // A smaller tensor would waste more of its last page than it gains.
  if (needed < 4 * kHuge) return at::empty({numel}, options);
  const std::size_t bytes = (needed + kHuge - 1) / kHuge * kHuge;
  void* memory = std::aligned_alloc(kHuge, bytes);
  TORCH_CHECK(memory != nullptr, "empty_on_huge_pages: no memory for ", bytes, " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(memory, bytes, MADV_HUGEPAGE);  // a wish; without it the memory is as good as any
#endif
  return at::from_blob(memory, {numel}, [](void* p) { std::free(p); }, options);
}

// Room for a weight's gradient. A large one comes from the system anew in every step, in pages that are cleared one by one.
inline Tensor gradient_of(const Tensor& weight) { return empty_on_huge_pages(weight.numel(), weight.scalar_type()); }

}  // namespace fastmaf_native
