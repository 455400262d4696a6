// Threads that work for one call at a time, and memory that is kept from call to call.
//
// The calling thread leads: it publishes a loop of parts, and whoever is running takes the next part, itself included. A loop ends
// when its parts are done, not when every thread has come by: a thread that the system does not run holds nobody up unless it has
// taken a part.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace fastmaf {

// One call's loop: body(context, part).
struct Loop {
  void (*body)(const void* context, int64_t part);
  const void* context;
  int64_t parts;
};

// The pool, shared by all instruction sets; see thread_pool.cpp.
class Team {
 public:
  // Up to `threads` threads, the calling one included; one where the pool serves another call already.
  explicit Team(int64_t threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int64_t threads() const { return helpers_ + 1; }

  // Calls body(part) for every part of 0..parts, each on the thread that comes first.
  template <class Body>
  void each(int64_t parts, const Body& body) const {
    if (helpers_ == 0 || parts <= 1) {
      for (int64_t part = 0; part < parts; ++part) body(part);
      return;
    }
    run({[](const void* context, int64_t part) { (*static_cast<const Body*>(context))(part); }, &body, parts});
  }

 private:
  void run(const Loop& loop) const;
  int64_t helpers_ = 0;
};

// The processors that this process may run on.
int64_t available_cores();

// Growing buffers of a thread, kept from call to call: fresh memory costs a page fault every 4 KB.
class Scratch {
 public:
  enum Slot { kState, kShared, kInput, kProduct, kGradient, kSlots };

  template <class T>
  static T* get(Slot slot, int64_t count) {
    return static_cast<T*>(grown(slot, static_cast<std::size_t>(count) * sizeof(T)));
  }

 private:
  static void* grown(Slot slot, std::size_t bytes);
};

// Denormal numbers count as zero in this scope: arithmetic on them is a hundred times slower, and Adam's moments of units that have
// died decay to them.
class [[maybe_unused]] FlushDenormals {
 public:
#if defined(__x86_64__) || defined(_M_X64)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#endif
};

}  // namespace fastmaf
