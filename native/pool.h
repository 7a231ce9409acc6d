// A persistent pool of threads that run one function over a range of tasks.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace fptq {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Calls task(0..tasks-1), each once, on all threads, the calling one among them, and returns when all are done.
  // Tasks are handed out one by one in ascending order. task(index, thread): thread counts from 0. After an exception
  // no more tasks are begun, and it is thrown here.
  template <class Task>
  void run(int64_t tasks, const Task& task) {
    if (tasks <= 0) return;
    if (threads_ == 1 || tasks == 1) {
      for (int64_t i = 0; i < tasks; ++i) task(i, 0);
      return;
    }
    run_all(tasks, [](const void* t, int64_t i, int thread) { (*static_cast<const Task*>(t))(i, thread); }, &task);
  }

  // Starts the threads anew in a process that was forked. Before `lock`, by one thread at a time.
  void revive();

  // To be held around every use of the pool.
  std::unique_lock<std::mutex> lock() { return std::unique_lock(mutex_); }

 private:
  using Call = void (*)(const void*, int64_t, int);
  void run_all(int64_t tasks, Call call, const void* task);
  void take_tasks(int thread);
  void work(int thread);
  void start();
  void stop();

  const int threads_;
  std::mutex mutex_;
  std::vector<std::thread> workers_;
  // A round is one run. Workers join it while it is open; who doesn't wake up in time, because others' threads occupy
  // the CPUs, isn't waited for. Bits: see pool.cc. Apart from `next_`, since waiting workers look at it all the time.
  alignas(64) std::atomic<uint32_t> state_;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<int64_t> next_{0};  // task
  std::exception_ptr failure_;                // of a task; written under failure_mutex_
  std::mutex failure_mutex_;
  int64_t tasks_ = 0;
  Call call_ = nullptr;
  const void* task_ = nullptr;
  long process_ = 0;
};

}  // namespace fptq
