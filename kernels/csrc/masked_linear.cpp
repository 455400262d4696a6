// y = act(W x + b), W a packed staircase.
#include "forward.h"
#include "kernels.h"

namespace fastmaf {

template <class T, class W>
void masked_linear(const Packed<const W>& p, const T* bias, const T* x, long n, bool relu, T* y, long threads) {
  T* pack = Scratch::get<T>(Scratch::kPack, pack_numel<T>(p.columns, n));
  run_team(useful_threads(p, n, threads), [&](Team& team) {
    for (long n0 = 0; n0 < n; n0 += kTileSamples) {
      const Shape shape = Shape::of<T>(std::min(n - n0, kTileSamples));
      forward_tile<T, W>(p, x + n0 * p.columns, shape, pack, team, [&](long row0, long row1, const Product<T>& c) {
        for (long s = 0; s < shape.samples; ++s) {
          const T* from = c.data + s * c.sample;
          T* to = y + (n0 + s) * p.rows;
          for (long r = row0; r < row1; ++r) {
            const T value = from[(r - row0) * c.row] + bias[r];
            to[r] = relu && value < 0 ? T(0) : value;  // NaN stays NaN
          }
        }
      });
    }
  });
}

template void masked_linear(const Packed<const float>&, const float*, const float*, long, bool, float*, long);
template void masked_linear(const Packed<const bfloat16>&, const float*, const float*, long, bool, float*, long);
template void masked_linear(const Packed<const double>&, const double*, const double*, long, bool, double*, long);

}  // namespace fastmaf
