// A team of torch's threads, and memory for one call that is not given back to the system after it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif
#include <thread>

namespace fastmaf {

// The processors that this process may run on.
inline long available_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const long cores = std::thread::hardware_concurrency();
  return cores > 0 ? cores : 1;
}

// Cuts work into parts for `size` threads that each take the next one when done: large ones first, then ever smaller ones, down to
// a sixteenth of a thread's share, so that all end together though one may be slower. Part i is cuts[i]..cuts[i + 1] of 0..1.
inline std::vector<double> guided_cuts(long size) {
  std::vector<double> cuts{0};
  if (size > 1)
    for (double left = 1; left > 1.0 / (16 * size);) {
      left -= std::max(left / (2 * size), 1.0 / (16 * size));
      cuts.push_back(1 - left);
    }
  cuts.push_back(1);
  return cuts;
}

// What the threads of a team share.
class TeamState {
 public:
  explicit TeamState(long size) : cuts(guided_cuts(size)), size_(size) {}
  // A barrier in two halves: what does not depend on the others can be done between arriving and waiting. Returns the ticket to
  // wait with.
  long arrive(long phase) {
    arrived_.fetch_add(1, std::memory_order_acq_rel);
    return (phase + 1) * size_;
  }
  void wait(long ticket) const {
    for (int spins = 0; arrived_.load(std::memory_order_acquire) < ticket; ++spins) {
#if defined(__x86_64__) || defined(_M_X64)
      _mm_pause();
#endif
#if defined(__unix__) || defined(__APPLE__)
      if (spins > 4000) sched_yield();  // more threads than cores: let the one that is waited for run
#endif
    }
  }
  long take() { return taken_.fetch_add(1, std::memory_order_relaxed); }
  const std::vector<double> cuts;

 private:
  alignas(64) std::atomic<long> arrived_{0};
  alignas(64) std::atomic<long> taken_{0};
  const long size_;
};

// One thread's view of its team.
class Team {
 public:
  Team(long rank, long size, TeamState& state) : rank(rank), size(size), state_(state) {}
  const long rank, size;

  void arrive() {
    if (size > 1) ticket_ = state_.arrive(phase_++);
  }
  void wait() {
    if (size > 1) state_.wait(ticket_);
  }
  void sync() {
    arrive();
    wait();
  }
  // This thread's share of 0..n, in multiples of `group`.
  void share(long n, long group, long& begin, long& end) const {
    const long groups = (n + group - 1) / group;
    begin = groups * rank / size * group;
    end = groups * (rank + 1) / size * group;
    begin = begin < n ? begin : n;
    end = end < n ? end : n;
  }
  // Calls body(i) for i = 0..count, each on the thread that comes first. All threads call it with the same count, and meet before
  // they call it again.
  template <class Body>
  void each(long count, const Body& body) {
    for (long i; (i = state_.take() - before_) < count;) body(i);
    before_ += count + size;  // every thread has taken one number too many
  }
  // The same over the parts of guided_cuts: body(i, cuts[i], cuts[i + 1]).
  long parts() const { return static_cast<long>(state_.cuts.size()) - 1; }
  template <class Body>
  void each_part(const Body& body) {
    each(parts(), [&](long i) { body(i, state_.cuts[i], state_.cuts[i + 1]); });
  }

 private:
  TeamState& state_;
  long phase_ = 0, ticket_ = 0, before_ = 0;
};

// How many parts each_part has at most in a team of up to `threads`.
inline long most_parts(long threads) { return static_cast<long>(guided_cuts(threads).size()) - 1; }

// Runs body(Team&) on up to `threads` threads of torch's OpenMP pool; they may wait for each other.
template <class Body>
void run_team(long threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1 && !omp_in_parallel()) {
    TeamState* shared = nullptr;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
#pragma omp single
      shared = new TeamState(omp_get_num_threads());  // it may be fewer than asked for
      Team team(omp_get_thread_num(), omp_get_num_threads(), *shared);
      body(team);
    }
    delete shared;
    return;
  }
#else
  (void)threads;
#endif
  TeamState state(1);
  Team team(0, 1, state);
  body(team);
}

// Growing buffers of a thread, kept from call to call: fresh memory costs a page fault every 4 KB.
class Scratch {
 public:
  enum Slot { kPack, kProduct, kGradient, kLevel, kLevelShared, kState, kSlots };

  template <class T>
  static T* get(Slot slot, long count) {
    thread_local Scratch scratch;
    return static_cast<T*>(scratch.grown(slot, static_cast<std::size_t>(count) * sizeof(T)));
  }
  ~Scratch() {
    for (void* p : memory_) std::free(p);
  }

 private:
  void* grown(Slot slot, std::size_t bytes) {
    if (bytes > size_[slot]) {
      std::free(memory_[slot]);
      size_[slot] = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      memory_[slot] = std::aligned_alloc(4096, size_[slot]);
      if (memory_[slot] == nullptr) {
        size_[slot] = 0;
        throw std::bad_alloc();
      }
    }
    return memory_[slot];
  }
  void* memory_[kSlots] = {};
  std::size_t size_[kSlots] = {};
};

// Denormal numbers count as zero in this scope: arithmetic on them is a hundred times slower, and Adam's moments of units
// that have died decay to them.
class FlushDenormals {
 public:
#if defined(__x86_64__) || defined(_M_X64)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#endif
};

}  // namespace fastmaf
