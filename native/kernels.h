// What a target (an instruction set) provides, and the private layouts that all targets share.
//
// Weights lie in panels of 32 output channels. A panel is a sequence of groups; a group is its codes, then its scales:
//
//   int4: steps × 64 bytes    byte 4·l + j of step s: low nibble  = q[l,      4·s + j] + 8     l = 0..15 channel
//                                                    high nibble = q[l + 16, 4·s + j] + 8     j = 0..3  input
//   int8: steps × 128 bytes   byte 4·l + j of step s: q[l, 4·s + j] + 128                      l = 0..31
//   scales: 32 × bfloat16     one for each channel
//
// Layers that stay in float have panels of k × 32 weights, bfloat16 or float32, and inputs in float32, row after row.
//
// A step is four inputs: what one lane of vpdpbusd or sdot adds up. steps = group_size / 4, rounded up; inputs past the
// group and channels past n have the code 0, channels past n the scale 0. So a matrix is one stream of bytes, read
// front to back.
//
// Activations lie in tiles of up to Kernels::rows rows: byte (s·r + i)·4 + j of a tile of r rows is input 4·s + j of
// its row i. Steps count through all groups.
//
// Codes are stored unsigned because vpdpbusd multiplies unsigned with signed bytes. Every group's accumulator starts at
// -offset·Σ q_a, which the tile carries beside its codes, so that what is added up is Σ q_a·(q_w + offset) - offset·Σ
// q_a.
#pragma once

#include <cstdint>

// In every target's file these are compiled for its instructions: they must not become functions that the linker could
// share between files.
#define FPTQ_INLINE [[gnu::always_inline]] inline

namespace fptq {

constexpr int kPanelChannels = 32;
constexpr int kStepInputs = 4;
constexpr int kScaleBytes = kPanelChannels * 2;

enum class WeightType : int { int4 = 4, int8 = 8, bfloat16 = 16, float32 = 32 };

// The shape of packed weights. Sums stay in int32: |Σ| <= 255·128·group_size < 2^31 up to group_size 65,536 (int8), and
// 15·128·group_size up to 2^20 (int4). Float weights have no groups.
struct Shape {
  int64_t n;
  int64_t k;
  int64_t group_size;
  WeightType type;

  FPTQ_INLINE bool is_float() const { return type == WeightType::bfloat16 || type == WeightType::float32; }

  FPTQ_INLINE int64_t groups() const { return k / group_size; }
  FPTQ_INLINE int64_t panels() const { return (n + kPanelChannels - 1) / kPanelChannels; }
  FPTQ_INLINE int64_t group_steps() const { return (group_size + kStepInputs - 1) / kStepInputs; }
  FPTQ_INLINE int64_t step_bytes() const { return type == WeightType::int4 ? 64 : 128; }
  FPTQ_INLINE int64_t group_bytes() const { return group_steps() * step_bytes() + kScaleBytes; }
  FPTQ_INLINE int64_t panel_bytes() const {
    return is_float() ? k * kPanelChannels * static_cast<int>(type) / 8 : groups() * group_bytes();
  }
  FPTQ_INLINE int64_t bytes() const { return panels() * panel_bytes(); }
  FPTQ_INLINE int offset() const { return type == WeightType::int4 ? 8 : 128; }
};

// What a panel's codes are when a tile is multiplied.
enum class Source {
  nibbles,  // as int4 panels have them
  bytes,    // the same unpacked: 0..15, in the order of int8 panels
  wide,     // as int8 panels have them: 0..255
};

// One panel times several tiles of rows, over some groups.
struct PanelProduct {
  const uint8_t* codes;   // first group's first step
  const uint8_t* scales;  // first group's scales
  int64_t codes_stride;   // bytes from one group to the next
  int64_t scales_stride;
  const uint8_t* next_panel;  // only prefetched, may point outside: what comes next, scales_stride bytes a group
  int64_t groups;
  int64_t steps;  // of a group
  Source source;
  int64_t first_group;         // within the activations
  const int8_t* activations;   // first tile
  const int32_t* corrections;  // [tile][group][row of the tile]: -offset·Σ q_a
  int64_t all_groups;          // of a tile
  int64_t rows;                // of all tiles
  int64_t tiles;
  const float* activation_scales;  // [rows], or null: `sums` isn't finished by this call
  const float* bias;               // [channels] or null
  float* sums;                     // [rows, 32 channels], row r at r·sums_stride
  int64_t sums_stride;
  int channels;  // valid ones of the 32
  bool add;      // to what is in `sums`, instead of overwriting it
};

// One panel of float weights times several rows: y = x·Wᵀ (+ bias), sums in float32.
struct FloatProduct {
  const uint8_t* weights;  // [k, 32 channels]
  WeightType type;
  int64_t k;
  const float* x;  // [rows, k]
  int64_t rows;
  const float* bias;  // [channels] or null
  float* y;           // row r at r·stride
  int64_t stride;
  int channels;  // valid ones of the 32
};

// Rows of tile `tile` when `rows` rows are spread over `tiles` tiles: as evenly as can be, larger ones first.
FPTQ_INLINE constexpr int64_t tile_rows(int64_t rows, int64_t tiles, int64_t tile) {
  return rows / tiles + (tile < rows % tiles);
}

// What an MLP does to its inner row. gelu is exact to 3e-7 of |x|, gelu_tanh its common approximation.
enum class Activation : int { silu, gelu, gelu_tanh, relu };

struct Norm {
  const float* weight;  // [k]
  const float* bias;    // [k] or null
  float eps;
  bool center;  // LayerNorm; otherwise RMSNorm
};

// Attention of consecutive query rows of one key/value head over its cache.
struct AttentionProduct {
  const float* queries;  // row i of query head h at i·query_stride + h·head_dim
  float* outputs;        // likewise, with output_stride
  int64_t query_stride;
  int64_t output_stride;
  int64_t rows;
  int64_t heads;  // query heads that share the key/value head
  int64_t head_dim;
  const int8_t* const* key_pages;    // [pages], each [head_dim, page_tokens] at head_offset
  const int8_t* const* value_pages;  // [pages], each [page_tokens, head_dim] at head_offset
  int64_t head_offset;
  int64_t page_tokens;
  float key_scale;
  float value_scale;
  float softmax_scale;
  float softcap;              // 0: none
  int64_t first_position;     // of query row 0; row i attends to positions 0..first_position + i
  int64_t window;             // 0: all; otherwise the last `window` positions
  const float* alibi_slopes;  // [heads] or null
  float* scratch;             // attention_scratch floats
};

// Columns of a weight matrix, rounded one after the other: those that come later make up for the errors of those before
// (GPTQ). Everything lies column after column, [columns, rows] with `stride` from one to the next.
struct Rounding {
  const float* values;
  const float* steps;   // what a code of 1 stands for
  const float* factor;  // [columns, columns], of which the lower triangle is read: what an error does to later columns
  int64_t columns;
  int64_t rows;  // up to kRoundingRows
  int64_t stride;
  float lowest;  // code
  float highest;
  int8_t* codes;
  float* errors;   // (value with all that was made up for - code · step) / factor[i, i]
  float* scratch;  // [columns, kRoundingRows]
};
constexpr int64_t kRoundingRows = 32;

struct Kernels {
  const char* name;
  int rows;                // of a tile of activations
  int tiles_from_nibbles;  // up to so many tiles multiply int4 panels directly; for more they are unpacked first
  int query_lanes;         // queries that attention looks at together

  // One tile of activations, from rows of k codes, and its corrections [group][row].
  void (*pack_tile)(const Shape& shape, int64_t rows, const int8_t* activations, int8_t* tile, int32_t* corrections);
  // Codes of an int4 panel's groups, a byte each in the layout of int8 panels, without scales.
  void (*unpack)(const uint8_t* codes, int64_t codes_stride, int64_t groups, int64_t steps, uint8_t* bytes);
  void (*multiply)(const PanelProduct& product);
  void (*multiply_float)(const FloatProduct& product);

  // codes[i] = round(x[i] / scale), to the even one if halfway, in -128..127. Returns whether no x is NaN; the code of
  // a NaN means nothing.
  bool (*quantize)(const float* x, int64_t k, float scale, int8_t* codes);
  // The same with the scale max|x| / 127, which it returns: 1 for a row of zeros, NaN if an x isn't finite.
  float (*quantize_dynamic)(const float* x, int64_t k, int8_t* codes);
  // One row: x normalized, written as floats to `out`, which may be x.
  void (*normalize)(const float* x, int64_t k, const Norm& norm, float* out);
  // The same, then `quantize`, in one pass.
  bool (*normalize_quantize)(const float* x, int64_t k, const Norm& norm, float scale, int8_t* codes);

  // out = activation(x), times `up` unless that is null. `out` may be x.
  void (*activate)(Activation activation, const float* x, const float* up, int64_t k, float* out);

  void (*round_in_turn)(const Rounding& rounding);

  int64_t (*attention_scratch)(int64_t heads, int64_t head_dim);
  void (*attend)(const AttentionProduct& product);

  // The limits of the machine, for benchmarks.
  int64_t (*read)(const uint8_t* data, int64_t bytes);
  int64_t (*dot)(int64_t steps);
};

// Key positions that attention looks at together.
constexpr int64_t kKeyBlock = 64;

}  // namespace fptq
