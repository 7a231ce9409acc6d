// Operators on many rows: blocking for the caches, and threads. Everything here takes plain arrays, row after row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace fptq {

// Memory that only grows, aligned to cache lines, not initialized.
class Buffer {
 public:
  // At least `bytes` bytes; what was there before is lost if it grows. Throws std::bad_alloc.
  void* reserve(size_t bytes);
  template <class T>
  T* reserve_array(int64_t count) {
    return static_cast<T*>(reserve(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> memory_;
  size_t bytes_ = 0;
};

// Threads and the memory they work in: for one caller at a time, see Pool::lock.
struct Workspace {
  explicit Workspace(int threads) : pool(threads), scratch(threads) {}
  Pool pool;
  Buffer activations;
  Buffer corrections;
  Buffer scales;
  std::vector<Buffer> scratch;  // of each thread
};

// Writes codes int8 [n, k] and scales float32 [n, groups] in the layout of kernels.h to `packed`, shape.bytes() long.
// Scales must be exact in bfloat16: their lower 16 bits are dropped.
void pack(const Shape& shape, const int8_t* codes, const float* scales, uint8_t* packed, Pool& pool);

// y[m,n] = activation_scales[m] · Σ_g w_scale[n,g] · Σ_{k∈g} q_a[m,k] · q_w[n,k] (+ bias[n])
void multiply(const Kernels& kernels, const Shape& shape, const uint8_t* packed, int64_t m, const int8_t* activations,
              const float* activation_scales, const float* bias, float* y, Workspace& workspace);

// `quantize`, then `multiply`: float inputs x [m, k].
void linear(const Kernels& kernels, const Shape& shape, const uint8_t* packed, int64_t m, const float* x,
            std::optional<float> scale, const float* bias, float* y, Workspace& workspace);

// Codes [m, k] and a scale for each row: `scale` (static), or without it max|x| / 127 of the row (dynamic). A row that
// can't be quantized, since it holds a NaN (or, dynamically, an infinity), gets the scale NaN.
void quantize(const Kernels& kernels, const float* x, int64_t m, int64_t k, std::optional<float> scale, int8_t* codes,
              float* scales, Workspace& workspace);

// Normalized rows as floats.
void normalize(const Kernels& kernels, const float* x, int64_t m, int64_t k, const Norm& norm, float* out,
               Workspace& workspace);

// Normalized rows, quantized as by `quantize`.
void normalize_quantize(const Kernels& kernels, const float* x, int64_t m, int64_t k, const Norm& norm,
                        std::optional<float> scale, int8_t* codes, float* scales, Workspace& workspace);

// Attention of m consecutive queries [m, heads, head_dim] of one sequence over an int8 cache.
struct Attention {
  const float* queries;
  float* outputs;  // [m, heads, head_dim]
  int64_t m;
  int64_t heads;
  int64_t kv_heads;  // divides heads; query head h reads head h / (heads / kv_heads)
  int64_t head_dim;
  const int8_t* const* key_pages;  // [pages], each [page_tokens, kv_heads, head_dim]
  const int8_t* const* value_pages;
  int64_t page_tokens;
  float key_scale;
  float value_scale;
  float softmax_scale;
  float softcap;              // 0: none
  int64_t first_position;     // of query 0; query i attends to positions 0..first_position + i
  int64_t window;             // 0: all; otherwise the last `window` positions
  const float* alibi_slopes;  // [heads] or null
};
void attend(const Kernels& kernels, const Attention& attention, Workspace& workspace);

// Reads all bytes (but for up to 255 at the end) with all threads, for measuring the memory.
void measure_read(const Kernels& kernels, const uint8_t* data, int64_t bytes, Workspace& workspace);

// Runs dot instructions on all threads, `steps` rounds on each, and returns how many operations that were.
int64_t measure_dot(const Kernels& kernels, int64_t steps, Workspace& workspace);

}  // namespace fptq
