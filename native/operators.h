// Operators on many rows: blocking for the caches, and threads. Everything here takes plain arrays, row after row.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace fptq {

// Fewer numbers than this aren't worth waking a thread.
constexpr int64_t kWorthAThread = 32 * 1024;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// The same of int4 from a checkpoint's words (docs/checkpoint.md), eight codes each [n, k / 8], and scales as bfloat16
// [n, groups]. Groups must be multiples of four inputs.
void pack_words(const Shape& shape, const uint32_t* words, const uint16_t* scales, uint8_t* packed, Pool& pool);

// Float weights [n, k] in the layout of kernels.h.
void pack_floats(const Shape& shape, const uint8_t* weights, uint8_t* packed, Pool& pool);

// Rows that are multiplied before the weights are read again.
constexpr int64_t kRowBlock = 512;

// The inputs of a product, up to kRowBlock rows, in the workspace.
struct Tiles {
  int64_t rows;
  int64_t count;
  const int8_t* codes;
  const int32_t* corrections;
  const float* scales;  // [rows]
};

// Rows brought into tiles. fill(row, codes [k], scratch of k floats) writes the codes of a row and returns their scale.
template <class Fill>
Tiles prepare(const Kernels& kernels, const Shape& shape, int64_t rows, const Fill& fill, Workspace& workspace);

// y = x̂·Ŵᵀ (+ bias); row r of y at r·stride.
void multiply_tiles(const Kernels& kernels, const Shape& shape, const uint8_t* packed, const Tiles& tiles,
                    const float* bias, float* y, int64_t stride, Workspace& workspace);

// The same of float weights and float rows [rows, k].
void multiply_floats(const Kernels& kernels, const Shape& shape, const uint8_t* packed, int64_t rows, const float* x,
                     const float* bias, float* y, int64_t stride, Workspace& workspace);

// y[m,n] = activation_scales[m] · Σ_g w_scale[n,g] · Σ_{k∈g} q_a[m,k] · q_w[n,k] (+ bias[n])
void multiply(const Kernels& kernels, const Shape& shape, const uint8_t* packed, int64_t m, const int8_t* activations,
              const float* activation_scales, const float* bias, float* y, Workspace& workspace);

// `quantize`, then `multiply`: float inputs x [m, k].
void linear(const Kernels& kernels, const Shape& shape, const uint8_t* packed, int64_t m, const float* x,
            std::optional<float> scale, const float* bias, float* y, Workspace& workspace);

// The codes of a row; returns their scale, NaN if the row can't be quantized.
float quantize_row(const Kernels& kernels, const float* x, int64_t k, std::optional<float> scale, int8_t* codes);
float normalize_quantize_row(const Kernels& kernels, const float* x, int64_t k, const Norm& norm,
                             std::optional<float> scale, int8_t* codes, float* scratch);

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

// Columns that make up for each other's errors, see Rounding; all arrays [columns, rows] but factor [columns, columns].
void round_in_turn(const Kernels& kernels, int64_t columns, int64_t rows, const float* values, const float* steps,
                   const float* factor, int bits, int8_t* codes, float* errors, Workspace& workspace);

// Attention of m consecutive queries of one sequence over an int8 cache.
struct Attention {
  const float* queries;  // row i of head h at i·query_stride + h·head_dim
  float* outputs;        // likewise, with output_stride
  int64_t query_stride;
  int64_t output_stride;
  int64_t m;
  int64_t heads;
  int64_t kv_heads;  // divides heads; query head h reads head h / (heads / kv_heads)
  int64_t head_dim;
  const int8_t* const* key_pages;    // [pages], each [kv_heads, head_dim, page_tokens]
  const int8_t* const* value_pages;  // [pages], each [kv_heads, page_tokens, head_dim]
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

// How many rows are best looked at together, and the attention of rows first..first + rows and the heads
// first_head..first_head + heads of those that share a key/value head. A row's result depends on none of these.
int64_t rows_together(const Kernels& kernels, const Attention& attention);
struct AttentionPart {
  int64_t kv_head, first_head, heads, first, rows;
};
void attend_part(const Kernels& kernels, const Attention& attention, const AttentionPart& part, Buffer& scratch);

// Reads all bytes (but for up to 255 at the end) with all threads, for measuring the memory.
void measure_read(const Kernels& kernels, const uint8_t* data, int64_t bytes, Workspace& workspace);

// Runs dot instructions on all threads, `steps` rounds on each, and returns how many operations that were.
int64_t measure_dot(const Kernels& kernels, int64_t steps, Workspace& workspace);

// Runs function(row, thread) for all rows, in pieces of at least kWorthAThread numbers.
template <class Function>
void for_rows(int64_t m, int64_t k, Workspace& workspace, const Function& function) {
  const int64_t pieces = 8 * workspace.pool.threads();
  const int64_t together = std::max(divide_up(kWorthAThread, std::max<int64_t>(k, 1)), divide_up(m, pieces));
  workspace.pool.run(divide_up(m, together), [&](int64_t i, int thread) {
    for (int64_t row = i * together; row < std::min(m, (i + 1) * together); ++row) function(row, thread);
  });
}

template <class Fill>
Tiles prepare(const Kernels& kernels, const Shape& shape, int64_t rows, const Fill& fill, Workspace& workspace) {
  const int64_t groups = shape.groups(), inputs = groups * shape.group_steps() * kStepInputs, k = shape.k;
  const int64_t tiles = divide_up(rows, kernels.rows);
  auto* const codes = workspace.activations.reserve_array<int8_t>(rows * inputs);
  auto* const corrections = workspace.corrections.reserve_array<int32_t>(rows * groups);
  auto* const scales = workspace.scales.reserve_array<float>(rows);
  const int64_t together = rows * k < kWorthAThread ? tiles : divide_up(tiles, 4 * workspace.pool.threads());
  workspace.pool.run(divide_up(tiles, together), [&](int64_t i, int thread) {
    auto* const scratch = workspace.scratch[thread].reserve_array<float>(k + divide_up(kernels.rows * k, 4));
    auto* const row_codes = reinterpret_cast<int8_t*>(scratch + k);
    for (int64_t tile = i * together; tile < std::min(tiles, (i + 1) * together); ++tile) {
      const int64_t first = tile * (rows / tiles) + std::min(tile, rows % tiles), count = tile_rows(rows, tiles, tile);
      for (int64_t r = 0; r < count; ++r) scales[first + r] = fill(first + r, row_codes + r * k, scratch);
      kernels.pack_tile(shape, count, row_codes, codes + first * inputs, corrections + first * groups);
    }
  });
  return {rows, tiles, codes, corrections, scales};
}

}  // namespace fptq
