// The panels of a layer and the rows in them, as parts that threads share; see kernels/layout.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "thread_pool.h"

namespace fastmaf {

constexpr int64_t kPanel = 16;  // rows of a panel

// How many numbers each row of a panel has, and where each begins among the numbers of all rows from this panel on.
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

// Panels first..last, whose rows begin with number `number` of those of all rows.
struct Part {
  int64_t first, last, number;
};

// Calls body(part) for parts of about two megabytes that cover all panels, on several threads.
//
// Fresh memory comes in huge pages of that size. Two threads that touch a new page at the same time both clear it, and the work of one is
// lost: parts that follow each other are taken one after another by the same thread, as long as all are equally fast.
template <class Body>
void each_part(const int64_t* prefix, const int64_t* panels, int64_t out_features, int64_t panel_count, int64_t item_size, int64_t threads,
               const Body& body) {
  constexpr int64_t kBytes = 1 << 21;
  std::vector<Part> parts;
  int64_t number = 0;
  for (int64_t p = 0; p < panel_count; ++p) {
    if (parts.empty() || (panels[p] - panels[parts.back().first]) * kPanel * item_size >= kBytes) parts.push_back({p, p, number});
    parts.back().last = p + 1;
    number += Rows(prefix, out_features, p).numbers;
  }
  const int64_t count = static_cast<int64_t>(parts.size());
  const Team team(std::min(threads, count));
  const int64_t run = (count + team.threads() - 1) / team.threads();
  team.each(run * team.threads(), [&](int64_t i) {
    const int64_t place = i % team.threads() * run + i / team.threads();
    if (place < count) body(parts[place]);
  });
}

}  // namespace fastmaf
