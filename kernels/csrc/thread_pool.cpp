// The pool's workers. They are created when a call first needs them, wait for work without a lock for some microseconds, give their
// core up when others want it, and sleep when there is nothing to do. A process that was forked starts with a pool of its own.
#include "thread_pool.h"

#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sched.h>
#endif

namespace fastmaf {
namespace {

using Clock = std::chrono::steady_clock;

// How long a thread waits in a loop of its own, and how long it then goes on asking while others may have its core.
constexpr auto kSpin = std::chrono::microseconds(20), kYield = std::chrono::microseconds(200);

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until ready() holds; returns false if it does not within kYield and `bounded`.
template <class Ready>
bool wait_for(const Ready& ready, bool bounded) {
  for (int i = 0; i < 64; ++i) {
    if (ready()) return true;
    pause();
  }
  const auto start = Clock::now();
  for (;;) {
    const auto waited = Clock::now() - start;
    if (bounded && waited > kYield) return ready();
    for (int i = 0; i < 16; ++i) {
      if (ready()) return true;
      pause();
    }
    if (waited > kSpin) std::this_thread::yield();
  }
}

struct Pool {
  // The number of the loop in the upper half, how many of its parts are not taken in the lower one: who takes a part has seen that
  // the loop is not finished, hence that `loop` is this one.
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int64_t> done{0};
  alignas(64) std::atomic<int64_t> helpers{0};  // of this call
  std::atomic<int64_t> asleep{0};
  Loop loop{};
  std::mutex mutex;
  std::condition_variable wake;
  std::exception_ptr error;
  int64_t workers = 0;

  // Takes and runs parts of the loop until none is left.
  void work() {
    uint64_t seen = ticket.load(std::memory_order_acquire);
    while (static_cast<uint32_t>(seen) != 0) {
      if (!ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      const int64_t part = loop.parts - static_cast<int64_t>(static_cast<uint32_t>(seen));
      try {
        loop.body(loop.context, part);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        error = std::current_exception();
      }
      done.fetch_add(1, std::memory_order_acq_rel);
      seen = ticket.load(std::memory_order_acquire);
    }
  }

  void worker(int64_t rank) {
    uint64_t last = 0;
    for (;;) {
      const auto news = [&] { return ticket.load(std::memory_order_acquire) >> 32 != last; };
      if (rank > helpers.load(std::memory_order_relaxed) || !wait_for(news, true)) {
        std::unique_lock<std::mutex> lock(mutex);
        asleep.fetch_add(1);
        wake.wait(lock, [&] { return ticket.load() >> 32 != last && rank <= helpers.load(); });
        asleep.fetch_sub(1);
      }
      last = ticket.load(std::memory_order_acquire) >> 32;
      work();
    }
  }

  void run(const Loop& next) {
    loop = next;
    done.store(0, std::memory_order_relaxed);
    const uint64_t number = (ticket.load(std::memory_order_relaxed) >> 32) + 1;
    ticket.store(number << 32 | static_cast<uint64_t>(next.parts));
    if (asleep.load() > 0) {
      const std::lock_guard<std::mutex> lock(mutex);
      wake.notify_all();
    }
    work();
    wait_for([&] { return done.load(std::memory_order_acquire) == next.parts; }, false);
    if (error) std::rethrow_exception(std::exchange(error, nullptr));
  }

  void grow(int64_t count) {
    for (; workers < count; ++workers) std::thread([this, rank = workers + 1] { worker(rank); }).detach();
  }
};

std::mutex leader;     // who holds it uses the pool
Pool* pool = nullptr;  // never destroyed: workers may outlive static objects

#if defined(__unix__) || defined(__APPLE__)
// A fork copies no threads, and may copy the mutex locked. No other thread is there yet that could use either.
[[maybe_unused]] const int handler = pthread_atfork(nullptr, nullptr, [] {
  new (&leader) std::mutex;
  pool = nullptr;
});
#endif

constexpr std::size_t kPage = 4096;

class Buffers {
 public:
  ~Buffers() {
    for (int slot = 0; slot < Scratch::kSlots; ++slot) release(slot);
  }
  void* grown(int slot, std::size_t bytes) {
    if (bytes > size_[slot]) {
      release(slot);
      const std::size_t size = (bytes + bytes / 4 + kPage - 1) / kPage * kPage;
      memory_[slot] = ::operator new(size, std::align_val_t(kPage));
      size_[slot] = size;
    }
    return memory_[slot];
  }

 private:
  void release(int slot) {
    ::operator delete(std::exchange(memory_[slot], nullptr), std::align_val_t(kPage));
    size_[slot] = 0;
  }
  void* memory_[Scratch::kSlots] = {};
  std::size_t size_[Scratch::kSlots] = {};
};

}  // namespace

int64_t available_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const int64_t cores = std::thread::hardware_concurrency();
  return cores > 0 ? cores : 1;
}

Team::Team(int64_t threads) {
  if (threads <= 1) return;
  threads = std::min(threads, available_cores());  // a loop waits for its last part: none may wait for a core
  if (threads <= 1) return;
  if (!leader.try_lock()) return;
  try {
    if (pool == nullptr) pool = new Pool;
    pool->grow(threads - 1);
  } catch (...) {  // no more threads: those that are there do
  }
  helpers_ = pool ? std::min(threads - 1, pool->workers) : 0;
  if (helpers_ == 0)
    leader.unlock();
  else
    pool->helpers.store(helpers_);
}

Team::~Team() {
  if (helpers_ > 0) leader.unlock();
}

void Team::run(const Loop& loop) const { pool->run(loop); }

void* Scratch::grown(Slot slot, std::size_t bytes) {
  thread_local Buffers buffers;
  return buffers.grown(slot, bytes);
}

}  // namespace fastmaf
