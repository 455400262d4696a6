// The output layer fused with the affine transform: the [n][2D] product lives in a block of rows at a time.
#include <vector>

#include "bound.h"
#include "forward.h"

namespace fastmaf {

template <class T, class W>
void affine_output(const Packed<const W>& p, const T* bias, const T* h, const T* x, long n, Bound bound, T* z, T* ladj,
                   T* log_scale, long threads) {
  constexpr int L = kLanes<T>;
  const long features = p.rows / 2;
  threads = useful_threads(p, n, threads);
  T* pack = Scratch::get<T>(Scratch::kPack, pack_numel<T>(p.columns, n));
  std::vector<double> partial(threads * n, 0.0);  // summed in the order of the threads: repeatable
  run_team(threads, [&](Team& team) {
    for (long n0 = 0; n0 < n; n0 += kTileSamples) {
      const Shape shape = Shape::of<T>(std::min(n - n0, kTileSamples));
      forward_tile<T, W>(p, h + n0 * p.columns, shape, pack, team, [&](long row0, long row1, const Product<T>& c) {
        constexpr long kDims = 20 * kGroupRows;
        T shift[kDims], raw[kDims];
        const long d0 = row0 / 2, dims = (row1 - row0) / 2;
        for (long s = 0; s < shape.samples; ++s) {
          const T* from = c.data + s * c.sample;
          for (long d = 0; d < dims; ++d) {
            shift[d] = from[2 * d * c.row] + bias[row0 + 2 * d];
            raw[d] = from[(2 * d + 1) * c.row] + bias[row0 + 2 * d + 1];
          }
          const long at = (n0 + s) * features + d0;
          double total = 0;
          for (long d = 0; d < dims; d += L) {
            const long count = std::min<long>(L, dims - d);
            const bool whole = count == L;
            const Vec<T> u = whole ? load(raw + d) : load_part<T>(raw + d, count);
            const Vec<T> m = whole ? load(shift + d) : load_part<T>(shift + d, count);
            const Vec<T> xv = whole ? load(x + at + d) : load_part<T>(x + at + d, count);
            const Vec<T> a = bound_log_scale<T>(u, bound);
            const Vec<T> zv = (xv - m) * exponential(-a);
            if (whole) {
              store(z + at + d, zv);
              store(log_scale + at + d, a);
            } else {
              store_part(z + at + d, zv, count);
              store_part(log_scale + at + d, a, count);
            }
            total += sum<T>(a);
          }
          partial[team.rank * n + n0 + s] += total;
        }
      });
    }
  });
  for (long s = 0; s < n; ++s) {
    double total = 0;
    for (long t = 0; t < threads; ++t) total += partial[t * n + s];
    ladj[s] = static_cast<T>(-total);
  }
}

template void affine_output(const Packed<const float>&, const float*, const float*, const float*, long, Bound, float*, float*,
                            float*, long);
template void affine_output(const Packed<const bfloat16>&, const float*, const float*, const float*, long, Bound, float*,
                            float*, float*, long);
template void affine_output(const Packed<const double>&, const double*, const double*, const double*, long, Bound, double*,
                            double*, double*, long);

}  // namespace fastmaf
