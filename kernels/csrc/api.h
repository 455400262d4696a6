// What the library's functions are given: plain pointers and numbers, described by structs that Python fills (see
// kernels/native_args.py). Matrices are row-major, but for weights; all are contiguous. Nothing here includes
// torch.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define FASTMAF_EXPORT extern "C" __declspec(dllexport)
#else
#define FASTMAF_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace fastmaf {

enum Dtype : int64_t { kFloat32, kFloat64, kBfloat16 };
enum Form : int64_t { kShiftFirst, kScaleFirst };
enum Scale : int64_t { kClamp, kTanh, kSoftplus, kSigmoid, kSoftClip };

// The element-wise map of an output layer; see kernels/affine_output/affine_map.py.
struct AffineMap {
  int64_t form, scale;
  double limit, epsilon;
  double sign() const { return form == kShiftFirst ? -1 : 1; }
};

// One masked layer: its weight in panels of 16 rows (see kernels/layout.py).
struct Layer {
  const void* weight;
  const void* bias;
  const int64_t* prefix;  // [rows]
  const int64_t* panels;  // [panels + 1]
  int64_t rows, columns;
};

// One block: hidden layers, at least one, then the output layer, whose rows are pairs of shift and raw log-scale.
struct Block {
  int64_t first_layer, layer_count;
  const int32_t* schedule;  // [steps][layer_count], see schedule.py; the inverse alone reads it
  int64_t steps;
  const int64_t* permutation;  // of what the block is given (null: none): place d takes number permutation[d]
  AffineMap map;
};

// Blocks in a row. Dtypes: of activations and biases, and of weights (the same, or bfloat16 beside float32).
struct Flow {
  int64_t size, version;  // of this struct: a library refuses what it does not know
  int64_t dtype, weight_dtype, features, relu;
  int64_t layer_count, block_count;
  const Layer* layers;
  const Block* blocks;
  const int64_t* permutation;  // after the last block
};

// torch.optim.Adam's step (AdamW's if decoupled), see AdamNumbers.native_floats.
struct AdamNumbers {
  double step_size, beta1, beta2, eps, correction2_sqrt, weight_decay, lr, decoupled, maximize;
};

// What becomes of the gradient of a weight.
enum Mode : int64_t { kNone, kWrite, kAdam, kNorm };
struct Target {
  int64_t mode;
  void* grad;                            // kWrite: packed, zero in the padding; kNorm: one double, the sum of squares
  void *weight, *exp_avg, *exp_avg_sq;   // kAdam: changed in place
  const AdamNumbers* adam;
};

// One layer's backward pass starts from grad_y [n][rows] and, behind a ReLU, its output y; or, for an output layer, from the gradients
// of z, ladj [n] and log_scale (null: zero), with z and log_scale, all else [n][rows / 2]. All that a pass gives is `scale` times what
// these say, but for grad_x, the gradient of x through the map alone (null: not wanted).
struct Source {
  const void *grad_y, *relu_of;
  const void *grad_z, *grad_ladj, *grad_log_scale, *x, *z, *log_scale;
  void* grad_x;
  AffineMap map;
  double scale;
};

// The kernels of one instruction set, for one pair of dtypes.
struct Kernels {
  // terms: of each layer [n][rows], added to its sums (null: nothing), or null for none of all.
  void (*flow_forward)(const Flow&, const int32_t* places, const void* const* terms, const void* x, int64_t n, void* z, void* ladj,
                       void* saved, void* squares, int64_t threads);
  void (*flow_inverse)(const Flow&, const void* const* terms, const void* z, int64_t n, void* x, void* ladj, int64_t threads);
  void (*flow_backward)(const Flow&, const void* grad_z, const void* grad_ladj, const void* saved, int64_t n, void* grad_x,
                        void* const* grad_biases, const Target* targets, int64_t threads);
  void (*linear)(const Layer&, const void* x, int64_t n, bool relu, void* y, int64_t threads);
  void (*affine)(const Layer&, const AffineMap&, const void* h, const void* x, int64_t n, void* z, void* ladj, void* log_scale,
                 int64_t threads);
  void (*layer_backward)(const Layer&, const Source&, const void* x, int64_t n, void* grad_x, void* grad_bias, const Target&,
                         int64_t threads);
  bool (*has_matrix_unit)();  // that the kernels use, here
};

}  // namespace fastmaf
