#include "pool.h"

#include <new>
#include <utility>

#if defined(_WIN32)
#include <windows.h>
#else
#include <unistd.h>
#endif

namespace fptq {
namespace {

// Some 30 µs on Zen 4: longer than what lies between two operators, shorter than anything a user notices.
constexpr int kSpins = 1500;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

#if defined(_WIN32)
// Not std::atomic's: libstdc++ without futexes loses wake-ups before GCC 12.3 (its PR 106183).
void wait(std::atomic<uint32_t>& state, uint32_t old) {
  while (state.load(std::memory_order_acquire) == old) WaitOnAddress(&state, &old, sizeof old, INFINITE);
}
void wake_all(std::atomic<uint32_t>& state) { WakeByAddressAll(&state); }

long process_id() { return 0; }  // there are no forks
#else
void wait(std::atomic<uint32_t>& state, uint32_t old) { state.wait(old, std::memory_order_acquire); }
void wake_all(std::atomic<uint32_t>& state) { state.notify_all(); }

long process_id() { return getpid(); }
#endif

// Pool::state_: the number of the round, whether it is closed, and how many workers are in it.
constexpr uint32_t kWorkers = 0x7FF, kClosed = 0x800, kRound = 0x1000;

uint32_t round_of(uint32_t state) { return state / kRound; }

}  // namespace

Pool::Pool(int threads) : threads_(threads), state_(kClosed) { start(); }

Pool::~Pool() {
  if (process_ == process_id()) {
    stop();
  } else {  // the threads stayed in the parent process, and one that isn't there can't be joined
    new std::vector<std::thread>(std::move(workers_));
  }
}

void Pool::revive() {
  if (process_ == process_id()) return;
  // After a fork only the calling thread exists: the mutex may be locked by another, the workers are gone.
  new (&mutex_) std::mutex;
  new std::vector<std::thread>(std::move(workers_));  // never freed, see above
  workers_.clear();
  start();
}

void Pool::start() {
  process_ = process_id();
  state_.store(kClosed);
  try {
    for (int thread = 1; thread < threads_; ++thread) workers_.emplace_back([this, thread] { work(thread); });
  } catch (...) {  // the system has no more threads
    stop();
    throw;
  }
}

void Pool::stop() {
  stop_.store(true);
  state_.fetch_add(kRound);
  wake_all(state_);
  for (auto& worker : workers_) worker.join();
  workers_.clear();
}

void Pool::work(int thread) {
  uint32_t done = round_of(kClosed);
  for (int spins = 0;;) {
    uint32_t state = state_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_acquire)) return;  // after the state: `stop` changes it later
    const bool joinable = !(state & kClosed) && round_of(state) != done;
    if (joinable && state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
      take_tasks(thread);
      done = round_of(state);
      spins = 0;
      const uint32_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
      if ((before & kClosed) && (before & kWorkers) == 1) wake_all(state_);
    } else if (!joinable) {
      if (++spins < kSpins) {
        pause();
      } else {
        wait(state_, state);
      }
    }
  }
}

void Pool::take_tasks(int thread) {
  for (;;) {
    const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
    if (i >= tasks_) return;
    try {
      call_(task_, i, thread);
    } catch (...) {
      const std::lock_guard lock(failure_mutex_);
      if (!failure_) failure_ = std::current_exception();
      next_.store(tasks_, std::memory_order_relaxed);
    }
  }
}

void Pool::run_all(int64_t tasks, Call call, const void* task) {
  tasks_ = tasks;
  call_ = call;
  task_ = task;
  next_.store(0, std::memory_order_relaxed);
  // The last round is closed and empty: nobody else writes the state now.
  state_.store((state_.load(std::memory_order_relaxed) | kClosed) - kClosed + kRound);
  wake_all(state_);
  take_tasks(0);
  uint32_t state = state_.fetch_or(kClosed, std::memory_order_acq_rel) | kClosed;
  for (int spins = 0; state & kWorkers; state = state_.load(std::memory_order_acquire)) {
    if (++spins < kSpins) {
      pause();
    } else {
      wait(state_, state);
    }
  }
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

}  // namespace fptq
