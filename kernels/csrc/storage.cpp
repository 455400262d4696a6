// Conversion of packed weights between panels and rows, in memory and in files, and clearing of their padding; see kernels/layout.py.
//
// Rows are the visible weights alone, row after row: the order of model files, which does not depend on the panels. Numbers are moved
// as bits, so that every dtype of 2, 4 or 8 bytes is served.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#include "api.h"
#include "files.h"
#include "rows.h"

namespace fastmaf {
namespace {

enum Status { kFine, kNotFinite, kEnd };  // or the negative of an errno

// A square of numbers whose rows are vectors of 16 bytes, which every CPU has.
template <class Bits>
struct Square {
  static constexpr int64_t kSide = 16 / sizeof(Bits);
  typedef Bits Vector __attribute__((vector_size(16)));
  Vector row[kSide];

  void load(int64_t i, const Bits* from) { std::memcpy(&row[i], from, sizeof(Vector)); }
  void store(int64_t i, Bits* to) const { std::memcpy(to, &row[i], sizeof(Vector)); }

  void transpose() { transpose(std::make_index_sequence<kSide>()); }

 private:
  template <std::size_t... lane>
  void transpose(std::index_sequence<lane...>) {
    constexpr int64_t kHalf = kSide / 2;
    for (int64_t rounds = kSide; rounds > 1; rounds /= 2) {
      Vector next[kSide];
      for (int64_t i = 0; i < kHalf; ++i) {
        const Vector a = row[i], b = row[i + kHalf];
        next[2 * i] = Vector{(lane % 2 ? b : a)[lane / 2]...};
        next[2 * i + 1] = Vector{(lane % 2 ? b : a)[kHalf + lane / 2]...};
      }
      for (int64_t i = 0; i < kSide; ++i) row[i] = next[i];
    }
  }
};

// Finds numbers that are infinite or NaN: all bits of their exponent are set.
template <class Bits>
struct NotFinite {
  using Vector = typename Square<Bits>::Vector;
  Vector exponent, marks{};

  explicit NotFinite(uint64_t bits) : exponent(Vector{} + static_cast<Bits>(bits)) {}

  void see(const Vector& numbers) { marks |= (Vector)((numbers & exponent) == exponent); }
  bool none() const {
    for (int64_t i = 0; i < Square<Bits>::kSide; ++i)
      if (marks[i] != 0) return false;
    return true;
  }
};

template <class Bits>
int rows_to_panels(const Bits* rows, Bits* weight, const int64_t* prefix, const int64_t* panels, int64_t out_features, int64_t first,
                   int64_t last, uint64_t exponent) {
  constexpr int64_t kSide = Square<Bits>::kSide;
  NotFinite<Bits> found(exponent);
  for (int64_t p = first; p < last; ++p) {
    const Rows r(prefix, out_features, p);
    Bits* panel = weight + kPanel * panels[p];
    const int64_t width = panels[p + 1] - panels[p], most = *std::max_element(r.sees, r.sees + kPanel);
    int64_t k = 0;
    for (; k + kSide <= r.common; k += kSide)
      for (int64_t j = 0; j < kPanel; j += kSide) {
        Square<Bits> square;
        for (int64_t i = 0; i < kSide; ++i) {
          square.load(i, rows + r.begin[j + i] + k);
          found.see(square.row[i]);
        }
        square.transpose();
        for (int64_t i = 0; i < kSide; ++i) square.store(i, panel + (k + i) * kPanel + j);
      }
    for (; k < most; k += kSide)  // columns that not every row sees
      for (int64_t j = 0; j < kPanel; j += kSide) {
        Square<Bits> square{};
        for (int64_t i = 0; i < kSide; ++i) {
          const int64_t count = std::min(r.sees[j + i] - k, kSide);
          if (count > 0) std::memcpy(&square.row[i], rows + r.begin[j + i] + k, count * sizeof(Bits));
          found.see(square.row[i]);
        }
        square.transpose();
        for (int64_t i = 0; i < std::min(kSide, width - k); ++i) square.store(i, panel + (k + i) * kPanel + j);
      }
    if (k < width) std::fill(panel + k * kPanel, panel + width * kPanel, Bits(0));
    rows += r.numbers;
  }
  return found.none() ? kFine : kNotFinite;
}

template <class Bits>
int panels_to_rows(const Bits* weight, Bits* rows, const int64_t* prefix, const int64_t* panels, int64_t out_features, int64_t first,
                   int64_t last, uint64_t exponent) {
  constexpr int64_t kSide = Square<Bits>::kSide;
  NotFinite<Bits> found(exponent);
  for (int64_t p = first; p < last; ++p) {
    const Rows r(prefix, out_features, p);
    const Bits* panel = weight + kPanel * panels[p];
    const int64_t width = panels[p + 1] - panels[p];
    int64_t k = 0;
    for (; k + kSide <= r.common; k += kSide)
      for (int64_t j = 0; j < kPanel; j += kSide) {
        Square<Bits> square;
        for (int64_t i = 0; i < kSide; ++i) {
          square.load(i, panel + (k + i) * kPanel + j);
          found.see(square.row[i]);
        }
        square.transpose();
        for (int64_t i = 0; i < kSide; ++i) square.store(i, rows + r.begin[j + i] + k);
      }
    for (; k < width; k += kSide)
      for (int64_t j = 0; j < kPanel; j += kSide) {
        Square<Bits> square{};
        for (int64_t i = 0; i < std::min(kSide, width - k); ++i) {
          square.load(i, panel + (k + i) * kPanel + j);
          found.see(square.row[i]);
        }
        square.transpose();
        for (int64_t i = 0; i < kSide; ++i) {
          const int64_t count = std::min(r.sees[j + i] - k, kSide);
          if (count > 0) std::memcpy(rows + r.begin[j + i] + k, &square.row[i], count * sizeof(Bits));
        }
      }
    rows += r.numbers;
  }
  return found.none() ? kFine : kNotFinite;
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

// Calls work(part, number) for all parts of a layer, with a number of the unsigned type of `item_size` bytes. Returns kFine if all calls
// do, else the status of another one.
template <class Work>
int on_parts(const int64_t* prefix, const int64_t* panels, int64_t out_features, int64_t panel_count, int64_t item_size, int64_t threads,
             const Work& work) {
  std::atomic<int> status{kFine};
  try {
    each_part(prefix, panels, out_features, panel_count, item_size, threads, [&](const Part& part) {
      const int result = item_size == 2 ? work(part, uint16_t{}) : item_size == 4 ? work(part, uint32_t{}) : work(part, uint64_t{});
      if (result != kFine) status.store(result, std::memory_order_relaxed);
    });
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
  return status.load();
}

// Moves `bytes` between memory and a place in a file; call(memory, bytes, place) moves some of them.
template <class Call>
int move(char* memory, int64_t bytes, int64_t place, const Call& call) {
  while (bytes > 0) {
    const int64_t moved = call(memory, static_cast<std::size_t>(std::min(bytes, int64_t{1} << 30)), place);  // every system moves so many
    if (moved == -EINTR) continue;
    if (moved <= 0) return moved < 0 ? static_cast<int>(moved) : kEnd;
    memory += moved, place += moved, bytes -= moved;
  }
  return kFine;
}

// Calls work(rows, bytes, place in the file, first panel, last panel) for the panels of a part until it does not return kFine. These are
// some at a time, whose rows fit in a second-level cache; `rows` is memory for them.
template <class Bits, class Work>
int through_buffer(const Part& part, const int64_t* prefix, int64_t out_features, int64_t place, const Work& work) {
  constexpr int64_t kBuffer = (1 << 18) / sizeof(Bits);
  place += part.number * static_cast<int64_t>(sizeof(Bits));
  for (int64_t first = part.first, last = first; first < part.last; first = last) {
    int64_t count = 0;
    do count += Rows(prefix, out_features, last++).numbers;
    while (last < part.last && count < kBuffer);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(Bits));
    const int status = work(Scratch::get<Bits>(Scratch::kInput, count), bytes, place, first, last);
    if (status != kFine) return status;
    place += bytes;
  }
  return kFine;
}

}  // namespace

// The functions return 0; 1 if a number is infinite or NaN; 2 if the file ends before; or the negative of an errno. `exponent` has the
// exponent's bits of the dtype.

// Writes all panels of `weight`, padding included.
FASTMAF_EXPORT int fastmaf_rows_to_panels(const void* rows, void* weight, const int64_t* prefix, const int64_t* panels,
                                          int64_t out_features, int64_t panel_count, int64_t item_size, uint64_t exponent,
                                          int64_t threads) {
  return on_parts(prefix, panels, out_features, panel_count, item_size, threads, [&](const Part& part, auto bits) {
    using Bits = decltype(bits);
    return rows_to_panels(static_cast<const Bits*>(rows) + part.number, static_cast<Bits*>(weight), prefix, panels, out_features,
                          part.first, part.last, exponent);
  });
}

// The way back: writes all rows.
FASTMAF_EXPORT int fastmaf_panels_to_rows(const void* weight, void* rows, const int64_t* prefix, const int64_t* panels,
                                          int64_t out_features, int64_t panel_count, int64_t item_size, uint64_t exponent,
                                          int64_t threads) {
  return on_parts(prefix, panels, out_features, panel_count, item_size, threads, [&](const Part& part, auto bits) {
    using Bits = decltype(bits);
    return panels_to_rows(static_cast<const Bits*>(weight), static_cast<Bits*>(rows) + part.number, prefix, panels, out_features,
                          part.first, part.last, exponent);
  });
}

// Writes all panels from the rows that begin at a byte of a file, up to the first number of a part that is not finite.
FASTMAF_EXPORT int fastmaf_file_to_panels(int64_t file, int64_t place, void* weight, const int64_t* prefix, const int64_t* panels,
                                          int64_t out_features, int64_t panel_count, int64_t item_size, uint64_t exponent,
                                          int64_t threads) {
  const auto call = [file](char* to, std::size_t bytes, int64_t from) { return read_at(file, to, bytes, from); };
  return on_parts(prefix, panels, out_features, panel_count, item_size, threads, [&](const Part& part, auto bits) {
    using Bits = decltype(bits);
    const auto read = [&](Bits* rows, int64_t bytes, int64_t from, int64_t first, int64_t last) {
      const int status = move(reinterpret_cast<char*>(rows), bytes, from, call);
      if (status != kFine) return status;
      return rows_to_panels(rows, static_cast<Bits*>(weight), prefix, panels, out_features, first, last, exponent);
    };
    return through_buffer<Bits>(part, prefix, out_features, place, read);
  });
}

// Writes all rows to a file, from a byte of it on, up to the first number of a part that is not finite.
FASTMAF_EXPORT int fastmaf_panels_to_file(int64_t file, int64_t place, const void* weight, const int64_t* prefix, const int64_t* panels,
                                          int64_t out_features, int64_t panel_count, int64_t item_size, uint64_t exponent,
                                          int64_t threads) {
  const auto call = [file](const char* from, std::size_t bytes, int64_t to) { return write_at(file, from, bytes, to); };
  return on_parts(prefix, panels, out_features, panel_count, item_size, threads, [&](const Part& part, auto bits) {
    using Bits = decltype(bits);
    const auto write = [&](Bits* rows, int64_t bytes, int64_t to, int64_t first, int64_t last) {
      const int status = panels_to_rows(static_cast<const Bits*>(weight), rows, prefix, panels, out_features, first, last, exponent);
      return status == kFine ? move(reinterpret_cast<char*>(rows), bytes, to, call) : status;
    };
    return through_buffer<Bits>(part, prefix, out_features, place, write);
  });
}

struct PaddedWeight {
  void* weight;
  const int64_t *prefix, *panels;
  int64_t out_features, panel_count, item_size;
};

// Makes the padding of `count` weights zero, on the calling thread. Returns whether any of it was not.
FASTMAF_EXPORT int fastmaf_zero_padding(const PaddedWeight* weights, int64_t count) {
  int changed = 0;
  for (int64_t i = 0; i < count; ++i) {
    const PaddedWeight& w = weights[i];
    const auto zero = [&](auto bits) {
      return zero_padding(static_cast<decltype(bits)*>(w.weight), w.prefix, w.panels, w.out_features, w.panel_count);
    };
    changed |= w.item_size == 2 ? zero(uint16_t{}) : w.item_size == 4 ? zero(uint32_t{}) : zero(uint64_t{});
  }
  return changed;
}

}  // namespace fastmaf
