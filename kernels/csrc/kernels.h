// The entry points of the native kernels: plain pointers, no torch. All matrices are row-major and contiguous; T is float or
// double, W is T, or bfloat16 beside float. `threads` is how many of torch's threads a call may take.
#pragma once

#include "packed.h"

namespace fastmaf {

// What keeps log-scales within bounds; bound = infinity leaves them free.
struct Bound {
  double bound;
  bool soft;  // bound * tanh(u / bound) instead of a clamp
};

// y [n][rows] = act(W x + bias), x [n][columns].
template <class T, class W>
void masked_linear(const Packed<const W>& p, const T* bias, const T* x, long n, bool relu, T* y, long threads);

// z = (x - shift) exp(-log_scale), ladj = -sum log_scale; rows 2d and 2d + 1 of W h + bias are shift and raw log-scale of d.
template <class T, class W>
void affine_output(const Packed<const W>& p, const T* bias, const T* h, const T* x, long n, Bound bound, T* z, T* ladj,
                   T* log_scale, long threads);

// Where the gradient of a layer's product comes from. `relu_of` is its output where a ReLU follows, else null. All that a pass
// gives is `scale` times what these say, but for AffineGradient::grad_x.
template <class T>
struct LinearGradient {
  const T *grad_y, *relu_of;
  T scale = 1;
};
// The same for the fused output layer; grad_log_scale null: zero; grad_x [n][D], the gradient of x, is written beside (null: not
// wanted).
template <class T>
struct AffineGradient {
  const T *grad_z, *grad_ladj, *grad_log_scale, *z, *log_scale;
  Bound bound;
  T* grad_x;
  T scale = 1;
};

// What becomes of the gradient of the weight.
template <class T>
struct WriteGradient {
  T* grad;  // packed, zero in the padding
};
// torch.optim.Adam's step (AdamW's with `decoupled`), in place; moments packed like the weight.
template <class T>
struct AdamStep {
  T *weight, *exp_avg, *exp_avg_sq;
  double step_size, beta1, beta2, eps, correction2_sqrt, weight_decay, lr;
  bool decoupled, maximize;
};
struct NoWeightGradient {};
// The sum of its squares alone.
struct SquaredNorm {
  double* total;
  double* of_item = nullptr;  // set by linear_backward, to sum in an order that does not depend on the threads
};

// One pass over a weight: grad_x [n][columns] (null: not wanted), grad_bias [rows] (null: not wanted), and what `target` says.
template <class T, class Source, class Target>
void linear_backward(const Packed<const T>& p, const Source& source, const T* x, long n, T* grad_x, T* grad_bias,
                     const Target& target, long threads);

// One layer of a block.
template <class T, class W>
struct Layer {
  Packed<const W> p;
  const T* bias;
};
// One block: hidden layers, at least one, then the output layer; its schedule (see schedule.py), which the inverse alone reads; the
// permutation of what it is given (null: none): place d takes number permutation[d].
template <class T, class W>
struct Block {
  const Layer<T, W>* layers;
  long layer_count;
  const int32_t* schedule;
  long steps;
  bool relu;
  Bound bound;
  const int64_t* permutation;
};

// z [n][features] and ladj [n] of blocks in a row; `permutation` is applied to the last one's result (null: none). What the backward
// pass needs goes to `saved` (null: nothing is saved), saved_numel numbers: for each block x [n][features], only for the first and
// where there is a permutation before it, then its hidden layers, log_scale and z.
template <class T, class W>
void flow_forward(const Block<T, W>* blocks, long block_count, const int64_t* permutation, const T* x, long n, long features, T* z,
                   T* ladj, T* saved, long threads);
template <class T, class W>
long saved_numel(const Block<T, W>* blocks, long block_count, long n, long features);

// The backward pass: grad_x [n][features] (null: not wanted), the gradients of the biases, and what `targets` say of the weights:
// one entry per layer of the blocks, in their order.
template <class T, class Target>
void flow_backward(const Block<T, T>* blocks, long block_count, const int64_t* permutation, const T* grad_z, const T* grad_ladj,
                    const T* saved, long n, long features, T* grad_x, T* const* grad_biases, const Target* targets, long threads);

// x [n][features] and ladj [n] of a sequence of inverses; `permutation` is applied to the last one's result (null: none).
template <class T, class W>
void flow_inverse(const Block<T, W>* blocks, long block_count, const int64_t* permutation, const T* z, long n, long features,
                   T* x, T* ladj, long threads);

// The instruction sets beyond the baseline that these kernels were compiled for: what the processor must have.
const char* const* required_features();
// The numbers in a vector of float32.
int float_lanes();

}  // namespace fastmaf
