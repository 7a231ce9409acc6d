#include "pool.h"

#include <unistd.h>

#include <new>

namespace fptq {
namespace {

// About 50 µs: longer than the Python between two products, shorter than anything a user notices.
constexpr int kSpins = 1500;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

template <class T>
void wait_while(const std::atomic<T>& value, T old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

Pool::Pool(int threads) : threads_(threads) { start(); }

Pool::~Pool() {
  if (process_ != getpid()) {  // the threads stayed in the parent process
    new std::vector<std::thread>(std::move(workers_));
    return;
  }
  stop_.store(true);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (auto& worker : workers_) worker.join();
}

std::unique_lock<std::mutex> Pool::lock() {
  if (process_ != getpid()) {
    // After a fork only the calling thread exists: the mutex may be locked by another, the workers are gone.
    new (&mutex_) std::mutex;
    new std::vector<std::thread>(std::move(workers_));  // never freed: a thread that isn't there can't be joined
    workers_.clear();
    start();
  }
  return std::unique_lock(mutex_);
}

void Pool::start() {
  process_ = getpid();
  busy_.store(0);
  const uint32_t round = round_.load();
  for (int thread = 1; thread < threads_; ++thread)
    workers_.emplace_back([this, thread, round] { work(thread, round); });
}

void Pool::work(int thread, uint32_t round) {
  for (;;) {
    wait_while(round_, round);
    if (stop_.load(std::memory_order_acquire)) return;
    ++round;
    take_tasks(thread);
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
  }
}

void Pool::take_tasks(int thread) {
  for (;;) {
    const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
    if (i >= tasks_) return;
    call_(task_, i, thread);
  }
}

void Pool::run_all(int64_t tasks, Call call, const void* task) {
  tasks_ = tasks;
  call_ = call;
  task_ = task;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(threads_ - 1, std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  take_tasks(0);
  for (int busy; (busy = busy_.load(std::memory_order_acquire)) != 0;) wait_while(busy_, busy);
}

}  // namespace fptq
