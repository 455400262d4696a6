// Conversion of packed weights between panels and rows, and clearing of their padding; see kernels/layout.py.
//
// Rows are the visible weights alone, row after row: the order of model files, which does not depend on the panels. All functions
// run on the calling thread. They move numbers as bits, so that they serve every dtype of 2, 4 or 8 bytes.
#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kPanel = 16;                   // rows of a panel
constexpr int64_t kHalf = kPanel * kPanel / 2;  // half of the numbers that are transposed at once

// The rows of one panel: how many numbers each has, and where each begins among the numbers of all rows from this panel on.
struct Rows {
  int64_t sees[kPanel], begin[kPanel], numbers = 0, common;

  Rows(const int64_t* prefix, int64_t out_features, int64_t panel) {
    for (int64_t r = 0; r < kPanel; ++r) {
      const int64_t row = panel * kPanel + r;
      sees[r] = row < out_features ? prefix[row] : 0;
      begin[r] = numbers;
      numbers += sees[r];
    }
    common = std::min(sees[0], sees[kPanel - 1]);  // columns that every row sees; none where rows are missing
  }
};

// One of four rounds that transpose 16 x 16 numbers: out[2 n] = low[n], out[2 n + 1] = high[n]. Numbers whose places differ by the
// order of their index's bits move as vectors.
template <class Bits>
void interleave(const Bits* __restrict low, const Bits* __restrict high, Bits* __restrict out, int64_t count) {
  for (int64_t n = 0; n < count; ++n) {
    out[2 * n] = low[n];
    out[2 * n + 1] = high[n];
  }
}

// The rounds after the first but the last; the last one interleaves the halves of `a`.
template <class Bits>
void middle_rounds(Bits* a, Bits* b) {
  interleave(a, a + kHalf, b, kHalf);
  interleave(b, b + kHalf, a, kHalf);
}

// Finds numbers that are infinite or NaN: all bits of their exponent are set. One mark for each lane, so that lanes are vectors.
template <class Bits>
struct NotFinite {
  Bits exponent, marks[kPanel] = {};

  explicit NotFinite(uint64_t bits) : exponent(static_cast<Bits>(bits)) {}

  void see(const Bits* numbers, int64_t columns) {
    for (int64_t k = 0; k < columns; ++k)
      for (int64_t j = 0; j < kPanel; ++j) marks[j] |= static_cast<Bits>((numbers[k * kPanel + j] & exponent) == exponent);
  }

  bool none() const {
    return std::all_of(marks, marks + kPanel, [](Bits mark) { return mark == 0; });
  }
};

template <class Bits>
bool rows_to_panels(const Bits* rows, Bits* weight, const int64_t* prefix, const int64_t* panels, int64_t out_features, int64_t first,
                    int64_t last, uint64_t exponent) {
  alignas(64) Bits a[2 * kHalf], b[2 * kHalf];
  NotFinite<Bits> found(exponent);
  for (int64_t p = first; p < last; ++p) {
    const Rows r(prefix, out_features, p);
    Bits* panel = weight + kPanel * panels[p];
    const int64_t width = panels[p + 1] - panels[p], whole = r.common / kPanel * kPanel;
    for (int64_t k = 0; k < whole; k += kPanel) {  // 16 x 16 numbers are transposed within the first-level cache
      Bits* columns = panel + k * kPanel;
      for (int64_t j = 0; j < kPanel / 2; ++j)
        interleave(rows + r.begin[j] + k, rows + r.begin[j + kPanel / 2] + k, a + 2 * kPanel * j, kPanel);
      middle_rounds(a, b);
      interleave(a, a + kHalf, columns, kHalf);
      found.see(columns, kPanel);
    }
    for (int64_t k = whole; k < width; ++k) {
      Bits* column = panel + k * kPanel;
      for (int64_t j = 0; j < kPanel; ++j) column[j] = k < r.sees[j] ? rows[r.begin[j] + k] : Bits(0);
      found.see(column, 1);
    }
    rows += r.numbers;
  }
  return found.none();
}

template <class Bits>
bool panels_to_rows(const Bits* weight, Bits* rows, const int64_t* prefix, const int64_t* panels, int64_t out_features, int64_t first,
                    int64_t last, uint64_t exponent) {
  alignas(64) Bits a[2 * kHalf], b[2 * kHalf];
  NotFinite<Bits> found(exponent);
  for (int64_t p = first; p < last; ++p) {
    const Rows r(prefix, out_features, p);
    const Bits* panel = weight + kPanel * panels[p];
    const int64_t whole = r.common / kPanel * kPanel;
    for (int64_t k = 0; k < whole; k += kPanel) {
      interleave(panel + k * kPanel, panel + k * kPanel + kHalf, a, kHalf);
      middle_rounds(a, b);
      for (int64_t j = 0; j < kPanel; ++j)
        interleave(a + kPanel / 2 * j, a + kHalf + kPanel / 2 * j, rows + r.begin[j] + k, kPanel / 2);
    }
    for (int64_t j = 0; j < kPanel; ++j)
      for (int64_t k = whole; k < r.sees[j]; ++k) rows[r.begin[j] + k] = panel[k * kPanel + j];
    found.see(panel, panels[p + 1] - panels[p]);
    rows += r.numbers;
  }
  return found.none();
}

// Reads every number of the padding and writes only to columns that hold another one than zero: memory that a process shares with
// others, or that two threads look through at once, is left alone where it is clean.
template <class Bits>
bool zero_padding(Bits* weight, const int64_t* prefix, const int64_t* panels, int64_t out_features, int64_t panel_count) {
  bool changed = false;
  for (int64_t p = 0; p < panel_count; ++p) {
    const Rows r(prefix, out_features, p);
    for (int64_t k = r.common; k < panels[p + 1] - panels[p]; ++k) {
      Bits* column = weight + kPanel * (panels[p] + k);
      Bits any = 0;
      for (int64_t j = 0; j < kPanel; ++j) any |= k < r.sees[j] ? Bits(0) : column[j];
      if (any == 0) continue;
      changed = true;
      for (int64_t j = 0; j < kPanel; ++j)
        if (k >= r.sees[j]) column[j] = 0;
    }
  }
  return changed;
}

// Calls `work` with a number of the unsigned type of `item_size` bytes.
template <class Work>
int by_size(int64_t item_size, const Work& work) {
  return item_size == 2 ? work(uint16_t{}) : item_size == 4 ? work(uint32_t{}) : work(uint64_t{});
}

}  // namespace

extern "C" {
#pragma GCC visibility push(default)

// Writes panels first..last of `weight`, padding included; `rows` begins with the first row of panel `first`. `exponent` has the
// exponent's bits of the dtype. Returns whether all numbers are finite.
int fastmaf_rows_to_panels(const void* rows, void* weight, const int64_t* prefix, const int64_t* panels, int64_t out_features,
                           int64_t first, int64_t last, int64_t item_size, uint64_t exponent) {
  return by_size(item_size, [&](auto bits) {
    using Bits = decltype(bits);
    return rows_to_panels(static_cast<const Bits*>(rows), static_cast<Bits*>(weight), prefix, panels, out_features, first, last,
                          exponent);
  });
}

// The way back: writes the rows of panels first..last. Returns whether all of their numbers are finite.
int fastmaf_panels_to_rows(const void* weight, void* rows, const int64_t* prefix, const int64_t* panels, int64_t out_features,
                           int64_t first, int64_t last, int64_t item_size, uint64_t exponent) {
  return by_size(item_size, [&](auto bits) {
    using Bits = decltype(bits);
    return panels_to_rows(static_cast<const Bits*>(weight), static_cast<Bits*>(rows), prefix, panels, out_features, first, last,
                          exponent);
  });
}

struct PaddedWeight {
  void* weight;
  const int64_t *prefix, *panels;
  int64_t out_features, panel_count, item_size;
};

// Makes the padding of `count` weights zero. Returns whether any of it was not.
int fastmaf_zero_padding(const PaddedWeight* weights, int64_t count) {
  int changed = 0;
  for (int64_t i = 0; i < count; ++i) {
    const PaddedWeight& w = weights[i];
    changed |= by_size(w.item_size, [&](auto bits) {
      return zero_padding(static_cast<decltype(bits)*>(w.weight), w.prefix, w.panels, w.out_features, w.panel_count);
    });
  }
  return changed;
}

#pragma GCC visibility pop
}  // extern "C"
