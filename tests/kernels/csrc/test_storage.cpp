// Conversion of packed weights (kernels/csrc/storage.cpp), clearing of their padding and random numbers (uniform.cpp), on arrays of
// exactly the size that they may touch.
#if defined(_WIN32)
#include <io.h>
#else
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

extern "C" {
int fastmaf_rows_to_panels(const void*, void*, const int64_t*, const int64_t*, int64_t, int64_t, int64_t, uint64_t, int64_t);
int fastmaf_panels_to_rows(const void*, void*, const int64_t*, const int64_t*, int64_t, int64_t, int64_t, uint64_t, int64_t);
int fastmaf_file_to_panels(int64_t, int64_t, void*, const int64_t*, const int64_t*, int64_t, int64_t, int64_t, uint64_t, int64_t);
int fastmaf_panels_to_file(int64_t, int64_t, const void*, const int64_t*, const int64_t*, int64_t, int64_t, int64_t, uint64_t, int64_t);
int fastmaf_uniform_float(float*, const int64_t*, const int64_t*, int64_t, int64_t, uint64_t, double, int64_t);
int fastmaf_uniform_double(double*, const int64_t*, const int64_t*, int64_t, int64_t, uint64_t, double, int64_t);
struct PaddedWeight {
  void* weight;
  const int64_t *prefix, *panels;
  int64_t out_features, panel_count, item_size;
};
int fastmaf_zero_padding(const PaddedWeight*, int64_t);
}

void test_storage(int64_t threads);

namespace {

constexpr int64_t kPanel = 16;
std::mt19937 random_bits(11);

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "FAILED: storage: %s\n", what);
  std::exit(1);
}

// What the library is given for a file, and the end of a file.
#if defined(_WIN32)
int64_t handle(std::FILE* file) { return _get_osfhandle(_fileno(file)); }
bool truncate(std::FILE* file, int64_t size) { return _chsize_s(_fileno(file), size) == 0; }
#else
int64_t handle(std::FILE* file) { return fileno(file); }
bool truncate(std::FILE* file, int64_t size) { return ftruncate(fileno(file), size) == 0; }
#endif

struct Layout {
  std::vector<int64_t> prefix, panels{0};
  int64_t visible = 0;

  // `share` panels have one width.
  Layout(int64_t rows, int64_t columns, int64_t share) : prefix(rows) {
    for (int64_t& sees : prefix) sees = std::uniform_int_distribution<int64_t>(0, columns)(random_bits), visible += sees;
    std::sort(prefix.begin(), prefix.end());
    for (int64_t p = 0; p * kPanel < rows; ++p)
      panels.push_back(panels.back() + prefix[std::min((p / share + 1) * share * kPanel, rows) - 1]);
  }
  int64_t rows() const { return static_cast<int64_t>(prefix.size()); }
  int64_t count() const { return static_cast<int64_t>(panels.size()) - 1; }
  int64_t numel() const { return panels.back() * kPanel; }
};

// Bits: of a number; exponent: the bits of it that infinities and NaN have.
template <class Bits>
void test_of(const Layout& of, uint64_t exponent, int64_t threads) {
  const int64_t *prefix = of.prefix.data(), *panels = of.panels.data();
  const int64_t size = sizeof(Bits);
  std::vector<Bits> rows(of.visible), panel(of.numel(), Bits(1)), expected(of.numel(), Bits(0)), again(of.visible);
  for (Bits& number : rows) number = static_cast<Bits>(random_bits() % 1000 + 1);
  int64_t at = 0;
  for (int64_t row = 0; row < of.rows(); ++row)
    for (int64_t k = 0; k < of.prefix[row]; ++k) expected[(of.panels[row / kPanel] + k) * kPanel + row % kPanel] = rows[at++];
  const auto to_panels = [&] {
    return fastmaf_rows_to_panels(rows.data(), panel.data(), prefix, panels, of.rows(), of.count(), size, exponent, threads);
  };
  const auto to_rows = [&] {
    return fastmaf_panels_to_rows(panel.data(), again.data(), prefix, panels, of.rows(), of.count(), size, exponent, threads);
  };
  check(to_panels() == 0 && panel == expected, "panels");
  check(to_rows() == 0 && again == rows, "rows");

  std::FILE* file = std::tmpfile();
  check(file != nullptr, "a temporary file is wanted");
  constexpr int64_t kPlace = 7;  // rows may begin anywhere
  check(fastmaf_panels_to_file(handle(file), kPlace, panel.data(), prefix, panels, of.rows(), of.count(), size, exponent, threads) == 0,
        "a write");
  std::fill(panel.begin(), panel.end(), Bits(1));
  const auto read = [&] {
    return fastmaf_file_to_panels(handle(file), kPlace, panel.data(), prefix, panels, of.rows(), of.count(), size, exponent, threads);
  };
  check(read() == 0 && panel == expected, "a file");
  if (of.visible > 0) {
    check(truncate(file, kPlace + of.visible * size - 1) && read() == 2, "a file that ends before");
    for (const int64_t place : {int64_t{0}, of.visible / 2, of.visible - 1}) {
      const Bits good = rows[place];
      rows[place] = static_cast<Bits>(exponent | 1);
      check(to_panels() == 1 && to_rows() == 1, "a number that is not finite goes unnoticed");
      rows[place] = good;
    }
    check(to_panels() == 0, "panels again");
  }
  std::fclose(file);

  const PaddedWeight weight{panel.data(), prefix, panels, of.rows(), of.count(), size};
  check(fastmaf_zero_padding(&weight, 1) == 0 && panel == expected, "clean padding");
  if (of.numel() == of.visible) return;
  std::vector<int64_t> padding;
  for (int64_t p = 0; p < of.count(); ++p)
    for (int64_t k = 0; k < of.panels[p + 1] - of.panels[p]; ++k)
      for (int64_t row = p * kPanel; row < (p + 1) * kPanel; ++row)
        if (row >= of.rows() || k >= of.prefix[row]) padding.push_back((of.panels[p] + k) * kPanel + row % kPanel);
  for (const int64_t place : {padding.front(), padding[padding.size() / 2], padding.back()}) {
    panel[place] = 1;
    check(fastmaf_zero_padding(&weight, 1) == 1 && panel == expected, "padding that was written to");
  }
}

template <class T, class Fill>
void test_uniform(const Layout& of, const Fill& fill, int64_t threads) {
  std::vector<T> weight(of.numel(), T(9));
  check(fill(weight.data(), of.prefix.data(), of.panels.data(), of.rows(), of.count(), 5, 0.5, threads) == 0, "random numbers");
  std::vector<T> cleared = weight;
  const PaddedWeight padded{cleared.data(), of.prefix.data(), of.panels.data(), of.rows(), of.count(), sizeof(T)};
  check(fastmaf_zero_padding(&padded, 1) == 0, "random numbers in the padding");
  for (const T number : weight) check(number >= T(-0.5) && number < T(0.5), "a random number out of range");
}

}  // namespace

void test_storage(int64_t threads) {
  std::vector<Layout> layouts;
  for (const int64_t rows : {1, 2, 15, 16, 17, 40, 100})
    for (const int64_t columns : {0, 1, 3, 8, 33, 200}) layouts.emplace_back(rows, columns, 1 + rows % 3);
  layouts.emplace_back(700, 4000, 1);  // several parts
  for (const Layout& of : layouts) {
    test_of<uint16_t>(of, 0x7f80, threads);
    test_of<uint32_t>(of, 0x7f800000, threads);
    test_of<uint64_t>(of, 0x7ff0000000000000, threads);
    test_uniform<float>(of, fastmaf_uniform_float, threads);
    test_uniform<double>(of, fastmaf_uniform_double, threads);
  }
}
