// Products of bfloat16 weights by the matrix unit of x86 processors that have one (AMX): it multiplies bfloat16 numbers and sums the
// products in float32.
//
//     C [row][sample] float32  +=  A [row][32 columns]  B [pair of columns][sample][2]          16 rows, samples and pairs
//
// B comes from split_activations: a float32 number is the exact sum of three bfloat16 numbers, its upper, middle and lower eight bits,
// whose products with a weight are exact. A is a transposed block of a panel. The unit takes denormal numbers for zero, weights and
// results too: activations under 2^-110 have fewer bits, as parts of theirs are denormal, and those under 2^-126 are zero.
#pragma once

#include <optional>

#include "panels.h"

// By function, not by file: the AVX-512 kernels are the same with and without the unit, which is asked for at run time.
#if defined(__linux__) && defined(__x86_64__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && !defined(FASTMAF_LANES_ARE_ONE) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define FASTMAF_HAS_AMX 1
#define FASTMAF_AMX __attribute__((target("amx-tile,amx-bf16")))
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastmaf {
namespace FASTMAF_ISA {

#if defined(FASTMAF_HAS_AMX)
// Whether this processor has the unit and the system lets this process use it; the first call asks the system.
inline bool amx_ready() {
  static const bool ready = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;               // XGETBV
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 5) != 5) return false;  // bfloat16 products, tile registers
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    constexpr int64_t kAskPermission = 0x1023, kTileData = 18;
    return (a >> 17 & 3) == 3 && syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
  }();
  return ready;
}

// While one lives, its thread may call multiply_tiles. In use, tile registers are saved at every switch of threads and keep the core
// from its deeper sleep, so that they should be released at the end of a part of the work; this takes as long as a few products.
struct TileRegisters {
  FASTMAF_AMX TileRegisters() {
    // The number of the format, the bytes of a row of each register, and its rows, in eight bits.
    static const uint16_t shapes[32] = {1, 0, 0, 0, 0, 0, 0, 0, 64, 64, 64, 64, 64, 64, 64, 64,
                                        0, 0, 0, 0, 0, 0, 0, 0, 0x1010, 0x1010, 0x1010, 0x1010};
    _tile_loadconfig(shapes);
  }
  FASTMAF_AMX ~TileRegisters() { _tile_release(); }
};

// Tile registers for the rest of a scope, where they are wanted.
class UnitInUse {
 public:
  explicit UnitInUse(bool wanted) {
    if (wanted) registers_.emplace();
  }

 private:
  std::optional<TileRegisters> registers_;
};

inline constexpr int64_t kTileSamples = 16, kTileColumns = 32, kTileNumbers = 512;  // a block: 32 columns of 16 rows or samples
inline constexpr int64_t kTileParts = 3;  // bfloat16 numbers of an activation

// Numbers that split_activations writes.
constexpr int64_t split_numbers(int64_t columns) { return round_up(columns, kTileColumns) * kTileSamples * kTileParts; }

// x [columns][16 samples] as [block][part][pair of columns][sample][2], zero behind the last column. Returns whether all are finite:
// an infinity or NaN has no parts, and would spread to rows that do not see it, so that these samples need another kernel.
inline bool split_activations(const float* x, int64_t columns, bfloat16* to) {
  constexpr int kBroken = 0x99;  // infinities and NaN, signalling or not
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  __mmask16 broken = 0;
  for (int64_t k = 0; k < round_up(columns, kTileColumns); k += 2) {
    __m512 even = k < columns ? _mm512_loadu_ps(x + k * kTileSamples) : _mm512_setzero_ps();
    __m512 odd = k + 1 < columns ? _mm512_loadu_ps(x + (k + 1) * kTileSamples) : _mm512_setzero_ps();
    broken |= _mm512_fpclass_ps_mask(even, kBroken) | _mm512_fpclass_ps_mask(odd, kBroken);
    bfloat16* pair = to + split_numbers(k / kTileColumns * kTileColumns) + k % kTileColumns * kTileSamples;
#pragma GCC unroll 3
    for (int64_t part = 0; part < kTileParts; ++part) {
      const __m512i first = _mm512_castps_si512(even) & upper, second = _mm512_castps_si512(odd) & upper;
      _mm512_storeu_si512(pair + part * kTileNumbers, _mm512_or_si512(_mm512_srli_epi32(first, 16), second));
      even = _mm512_sub_ps(even, _mm512_castsi512_ps(first)), odd = _mm512_sub_ps(odd, _mm512_castsi512_ps(second));  // exact
    }
  }
  return broken == 0;
}

// to [8 rows][32] = the transpose of w [columns][the first 8 of 16 rows], zero behind the last column.
FASTMAF_INLINE void transpose_rows(const bfloat16* w, int64_t columns, bfloat16* to) {
  bfloat16 padded[kTileNumbers];
  if (columns < kTileColumns) {
    std::memset(padded, 0, sizeof padded);
    for (int64_t k = 0; k < columns; ++k) std::memcpy(padded + k * kPanel, w + k * kPanel, sizeof(__m128i));
    w = padded;
  }
  const auto column = [&](int k) FASTMAF_INLINE_LAMBDA { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + k * kPanel)); };
  __m512i a[8], b[8];
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {  // one column of every eight, put together as they are loaded
    a[k] = _mm512_mask_broadcast_i32x4(_mm512_castsi128_si512(column(k)), 0x00f0, column(k + 8));
    a[k] = _mm512_mask_broadcast_i32x4(a[k], 0x0f00, column(k + 16));
    a[k] = _mm512_mask_broadcast_i32x4(a[k], 0xf000, column(k + 24));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) b[i] = _mm512_unpacklo_epi16(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi16(a[i], a[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i first = b[i / 2 * 4 + i % 2], second = b[i / 2 * 4 + i % 2 + 2];
    a[2 * i] = _mm512_unpacklo_epi32(first, second), a[2 * i + 1] = _mm512_unpackhi_epi32(first, second);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + 2 * i * kTileColumns, _mm512_unpacklo_epi64(a[i], a[i + 4]));
    _mm512_storeu_si512(to + (2 * i + 1) * kTileColumns, _mm512_unpackhi_epi64(a[i], a[i + 4]));
  }
}

inline constexpr int64_t kTileBlocks = 16;  // transposed before the next samples take their turn
using Transposed = bfloat16[2][kTileBlocks * kTileNumbers];

// Some columns of one or two panels, and the panels that come next.
struct TileWeights {
  const bfloat16 *panel[2], *next[2];
  int64_t columns[2];
};

// C of P panels and T tiles over blocks begin..end, of which x is the first. kFirst: `a` is still to be transposed; two blocks ahead, as
// loads of tiles wait for what has been stored just now, and in pieces that the processor can do while it waits for products. Of each
// block of `next`, some cache lines are fetched, from `line` on.
template <int P, int T, bool kFirst>
FASTMAF_AMX void multiply_blocks(const TileWeights& w, int64_t begin, int64_t end, Transposed& a, const bfloat16* x, int64_t x_stride,
                                 float* c, int64_t c_stride, bool add, int64_t line, int64_t lines) {
  float* const cs[4] = {c, c + (P - 1) * kPanel * kTileSamples, c + (T - 1) * c_stride, c + (T - 1) * c_stride + kPanel * kTileSamples};
  const auto transpose = [&](int64_t i, int64_t half, int64_t stop) FASTMAF_INLINE_LAMBDA {
    for (; half < stop && i < end; ++half)
      transpose_rows(w.panel[half / 2] + i * kTileNumbers + half % 2 * (kPanel / 2), w.columns[half / 2] - i * kTileColumns,
                     a[half / 2] + (i - begin) * kTileNumbers + half % 2 * (kTileNumbers / 2));
    __asm__ volatile("" ::: "memory");  // to GCC, loads of tiles read no memory: it might do the stores later
  };
  transpose(begin, 0, kFirst ? 2 * P : 0);
  transpose(begin + 1, 0, kFirst ? 2 * P : 0);
  static const float zeros[kPanel * kTileSamples] = {};
  _tile_loadd(0, add ? cs[0] : zeros, 64);
  _tile_loadd(1, add ? cs[1] : zeros, 64);
  _tile_loadd(2, add ? cs[2] : zeros, 64);
  if constexpr (P == 2) _tile_loadd(3, add ? cs[3] : zeros, 64);
  for (int64_t i = begin; i < end; ++i, x += kTileParts * kTileNumbers) {
    for (int64_t j = line; j < line + lines; ++j)
      for (int p = 0; p < P; ++p) __builtin_prefetch(w.next[p] + i * kTileNumbers + j * 32, 0, 2);
    _tile_loadd(4, a[0] + (i - begin) * kTileNumbers, 64);
    if constexpr (P == 2) _tile_loadd(5, a[1] + (i - begin) * kTileNumbers, 64);
#pragma GCC unroll 3
    for (int64_t part = 0; part < kTileParts; ++part) {
      _tile_loadd(6, x + part * kTileNumbers, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (P == 2) _tile_dpbf16ps(1, 5, 6);
      if (kFirst && part < P) transpose(i + 2, 2 * part, 2 * part + 1);
      if constexpr (T == 2) _tile_loadd(7, x + x_stride + part * kTileNumbers, 64);
      if constexpr (T == 2) _tile_dpbf16ps(2, 4, 7);
      if constexpr (P == 2 && T == 2) _tile_dpbf16ps(3, 5, 7);
      if (kFirst && part < P) transpose(i + 2, 2 * part + 1, 2 * part + 2);
    }
  }
  _tile_stored(0, cs[0], 64);
  if constexpr (P == 2) _tile_stored(1, cs[1], 64);
  if constexpr (T == 2) _tile_stored(2, cs[2], 64);
  if constexpr (P == 2 && T == 2) _tile_stored(3, cs[3], 64);
}

// C of P panels and all tiles.
template <int P>
void multiply_panels(const TileWeights& w, const bfloat16* x, int64_t x_stride, int64_t tiles, float* c, int64_t c_stride, bool add) {
  alignas(64) Transposed a;
  const int64_t blocks = (w.columns[P - 1] + kTileColumns - 1) / kTileColumns, turns = (tiles + 1) / 2, lines = (16 + turns - 1) / turns;
  for (int64_t begin = 0; begin == 0 || begin < blocks; begin += kTileBlocks)
    for (int64_t t = 0; t < tiles; t += 2) {
      const auto run = t == 0 ? (tiles > 1 ? multiply_blocks<P, 2, true> : multiply_blocks<P, 1, true>)
                              : (tiles > t + 1 ? multiply_blocks<P, 2, false> : multiply_blocks<P, 1, false>);
      run(w, begin, std::min(begin + kTileBlocks, blocks), a, x + t * x_stride + split_numbers(begin * kTileColumns), x_stride,
          c + t * c_stride, c_stride, add || begin > 0, t / 2 * lines, lines);
    }
}

// C += or = (add) columns k0..k1 of one or two panels times the split activations of these columns, a tile every x_stride numbers. C of a
// tile, every c_stride numbers: [row][16 samples], the second panel's behind the first's. Needs TileRegisters. C is rounded three times a
// block: of many columns, the sums over strips of up to a thousand should be added up apart.
inline void multiply_tiles(const Panels<bfloat16>& w, int64_t p, int64_t panels, int64_t k0, int64_t k1, const bfloat16* x,
                           int64_t x_stride, int64_t tiles, float* c, int64_t c_stride, bool add) {
  TileWeights pair{};
  for (int64_t i = 0; i < panels; ++i) {
    pair.panel[i] = w.panel(p + i) + k0 * kPanel;
    pair.next[i] = w.panel(std::min(p + panels + i, w.count() - 1)) + k0 * kPanel;
    pair.columns[i] = std::max<int64_t>(0, std::min<int64_t>(k1, w.visible(p + i)) - k0);
  }
  if (panels == 1) return multiply_panels<1>(pair, x, x_stride, tiles, c, c_stride, add);
  // Blocks that the second panel alone sees are left to it.
  const int64_t both = round_up(pair.columns[0], kTileColumns), more = pair.columns[1] - both;
  pair.columns[1] = std::min(pair.columns[1], both);
  multiply_panels<2>(pair, x, x_stride, tiles, c, c_stride, add);
  const TileWeights rest{{pair.panel[1] + both * kPanel}, {pair.next[1] + both * kPanel}, {more}};
  if (more > 0) multiply_panels<1>(rest, x + split_numbers(both), x_stride, tiles, c + kPanel * kTileSamples, c_stride, true);
}
#else
inline bool amx_ready() { return false; }
struct [[maybe_unused]] UnitInUse {
  explicit UnitInUse(bool) {}
};
#endif

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
