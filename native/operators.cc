#include "operators.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <new>

namespace fptq {
namespace {

// Bytes of unpacked codes that rows are multiplied with before the next ones are unpacked.
constexpr int64_t kPanelBytes = 128 * 1024;
// Rows multiplied before the weights are read again.
constexpr int64_t kRowBlock = 512;
// Fewer numbers than this aren't worth waking a thread.
constexpr int64_t kWorthAThread = 32 * 1024;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs function(row, thread) for all rows, in pieces of at least kWorthAThread numbers.
template <class Function>
void for_rows(int64_t m, int64_t k, Workspace& workspace, const Function& function) {
  const int64_t pieces = 8 * workspace.pool.threads();
  const int64_t together = std::max(divide_up(kWorthAThread, std::max<int64_t>(k, 1)), divide_up(m, pieces));
  workspace.pool.run(divide_up(m, together), [&](int64_t i, int thread) {
    for (int64_t row = i * together; row < std::min(m, (i + 1) * together); ++row) function(row, thread);
  });
}

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Quantizes a row and returns its scale, NaN if it can't be quantized.
float quantize_row(const Kernels& kernels, const float* x, int64_t k, std::optional<float> scale, int8_t* codes) {
  if (!scale) return kernels.quantize_dynamic(x, k, codes);
  return kernels.quantize(x, k, *scale, codes) ? *scale : kNan;
}

// The product, with rows that prepare(first row, rows, tile, corrections, scales, thread) brings into a tile.
template <class Prepare>
void multiply_prepared(const Kernels& kernels, const Shape& shape, const uint8_t* packed, int64_t m,
                       const Prepare& prepare, const float* bias, float* y, Workspace& workspace) {
  const int64_t n = shape.n, groups = shape.groups(), panels = shape.panels();
  const int64_t all_steps = groups * shape.group_steps();
  const int64_t threads = workspace.pool.threads();
  for (int64_t start = 0; start < m; start += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, m - start), tiles = divide_up(rows, kernels.rows);
    auto* const tile_codes = workspace.activations.reserve_array<int8_t>(rows * all_steps * kStepInputs);
    auto* const corrections = workspace.corrections.reserve_array<int32_t>(rows * groups);
    auto* const scales = workspace.scales.reserve_array<float>(rows);
    const int64_t tiles_together = rows * shape.k < kWorthAThread ? tiles : divide_up(tiles, 4 * threads);
    workspace.pool.run(divide_up(tiles, tiles_together), [&](int64_t i, int thread) {
      for (int64_t tile = i * tiles_together; tile < std::min(tiles, (i + 1) * tiles_together); ++tile) {
        const int64_t row = tile * (rows / tiles) + std::min(tile, rows % tiles);
        prepare(start + row, tile_rows(rows, tiles, tile), tile_codes + row * all_steps * kStepInputs,
                corrections + row * groups, scales + row, thread);
      }
    });

    // With many tiles it may pay to take the nibbles apart once for all of them.
    const bool unpack = shape.type == WeightType::int4 && tiles > kernels.tiles_from_nibbles;
    const int64_t bytes_of_group = shape.group_steps() * kStepInputs * kPanelChannels;
    const int64_t groups_together = unpack ? std::clamp<int64_t>(kPanelBytes / bytes_of_group, 1, groups) : groups;
    const int64_t panels_together = std::max<int64_t>(1, panels / (threads * 8));
    workspace.pool.run(divide_up(panels, panels_together), [&](int64_t i, int thread) {
      uint8_t* bytes = nullptr;
      if (unpack) bytes = workspace.scratch[thread].reserve_array<uint8_t>(groups_together * bytes_of_group);
      const int64_t end = std::min(panels, (i + 1) * panels_together);
      for (int64_t first = 0; first < groups; first += groups_together) {
        for (int64_t panel = i * panels_together; panel < end; ++panel) {
          const uint8_t* const codes = packed + panel * shape.panel_bytes() + first * shape.group_bytes();
          PanelProduct p{};
          p.steps = shape.group_steps();
          p.groups = std::min(groups_together, groups - first);
          p.first_group = first;
          p.all_groups = groups;
          p.source = shape.type == WeightType::int8 ? Source::wide : unpack ? Source::bytes : Source::nibbles;
          p.codes = codes;
          p.codes_stride = shape.group_bytes();
          p.scales = codes + shape.group_steps() * shape.step_bytes();
          p.scales_stride = shape.group_bytes();
          // Behind the last panel this points outside, which a prefetch may.
          p.next_panel = codes + shape.panel_bytes();
          if (unpack) {
            kernels.unpack(codes, shape.group_bytes(), p.groups, p.steps, bytes);
            p.codes = bytes;
            p.codes_stride = bytes_of_group;
          }
          p.activations = tile_codes;
          p.corrections = corrections;
          p.rows = rows;
          p.tiles = tiles;
          p.add = first > 0;
          p.activation_scales = first + p.groups == groups ? scales : nullptr;
          p.bias = bias ? bias + panel * kPanelChannels : nullptr;
          p.sums = y + start * n + panel * kPanelChannels;
          p.sums_stride = n;
          p.channels = static_cast<int>(std::min<int64_t>(kPanelChannels, n - panel * kPanelChannels));
          kernels.multiply(p);
        }
      }
    });
  }
}

}  // namespace

void Buffer::Free::operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }

void* Buffer::reserve(size_t bytes) {
  if (bytes > bytes_) {
    memory_.reset();
    bytes_ = 0;
    memory_.reset(::operator new(bytes, std::align_val_t(64)));
    bytes_ = bytes;
  }
  return memory_.get();
}

void pack(const Shape& shape, const int8_t* codes, const float* scales, uint8_t* packed, Pool& pool) {
  const int64_t groups = shape.groups(), steps = shape.group_steps(), k = shape.k;
  pool.run(shape.panels(), [&](int64_t panel, int) {
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t* out = packed + panel * shape.panel_bytes() + g * shape.group_bytes();
      const auto code = [&](int64_t channel, int64_t input) -> uint8_t {
        const int64_t row = panel * kPanelChannels + channel;
        const int q = row < shape.n && input < shape.group_size ? codes[row * k + g * shape.group_size + input] : 0;
        return static_cast<uint8_t>(q + shape.offset());
      };
      for (int64_t s = 0; s < steps; ++s, out += shape.step_bytes()) {
        for (int b = 0; b < 64; ++b) {
          const int64_t channel = b / kStepInputs, input = s * kStepInputs + b % kStepInputs;
          if (shape.type == WeightType::int4) {
            out[b] = static_cast<uint8_t>(code(channel, input) | code(channel + 16, input) << 4);
          } else {
            out[b] = code(channel, input);
            out[b + 64] = code(channel + 16, input);
          }
        }
      }
      for (int c = 0; c < kPanelChannels; ++c, out += 2) {
        const int64_t row = panel * kPanelChannels + c;
        const float scale = row < shape.n ? scales[row * groups + g] : 0.0f;
        uint32_t bits;
        std::memcpy(&bits, &scale, 4);
        const uint16_t upper = static_cast<uint16_t>(bits >> 16);
        std::memcpy(out, &upper, 2);
      }
    }
  });
}

void multiply(const Kernels& kernels, const Shape& shape, const uint8_t* packed, int64_t m, const int8_t* activations,
              const float* activation_scales, const float* bias, float* y, Workspace& workspace) {
  const auto prepare = [&](int64_t first, int64_t rows, int8_t* tile, int32_t* corrections, float* scales, int) {
    kernels.pack_tile(shape, rows, activations + first * shape.k, tile, corrections);
    std::copy_n(activation_scales + first, rows, scales);
  };
  multiply_prepared(kernels, shape, packed, m, prepare, bias, y, workspace);
}

void linear(const Kernels& kernels, const Shape& shape, const uint8_t* packed, int64_t m, const float* x,
            std::optional<float> scale, const float* bias, float* y, Workspace& workspace) {
  const auto prepare = [&](int64_t first, int64_t rows, int8_t* tile, int32_t* corrections, float* scales, int thread) {
    auto* const codes = workspace.scratch[thread].reserve_array<int8_t>(rows * shape.k);
    for (int64_t r = 0; r < rows; ++r)
      scales[r] = quantize_row(kernels, x + (first + r) * shape.k, shape.k, scale, codes + r * shape.k);
    kernels.pack_tile(shape, rows, codes, tile, corrections);
  };
  multiply_prepared(kernels, shape, packed, m, prepare, bias, y, workspace);
}

void quantize(const Kernels& kernels, const float* x, int64_t m, int64_t k, std::optional<float> scale, int8_t* codes,
              float* scales, Workspace& workspace) {
  for_rows(m, k, workspace,
           [&](int64_t row, int) { scales[row] = quantize_row(kernels, x + row * k, k, scale, codes + row * k); });
}

void normalize(const Kernels& kernels, const float* x, int64_t m, int64_t k, const Norm& norm, float* out,
               Workspace& workspace) {
  for_rows(m, k, workspace, [&](int64_t row, int) { kernels.normalize(x + row * k, k, norm, out + row * k); });
}

void normalize_quantize(const Kernels& kernels, const float* x, int64_t m, int64_t k, const Norm& norm,
                        std::optional<float> scale, int8_t* codes, float* scales, Workspace& workspace) {
  for_rows(m, k, workspace, [&](int64_t row, int thread) {
    const float* from = x + row * k;
    int8_t* to = codes + row * k;
    if (scale) {
      scales[row] = kernels.normalize_quantize(from, k, norm, *scale, to) ? *scale : kNan;
    } else {
      float* y = workspace.scratch[thread].reserve_array<float>(k);
      kernels.normalize(from, k, norm, y);
      scales[row] = kernels.quantize_dynamic(y, k, to);
    }
  });
}

void attend(const Kernels& kernels, const Attention& a, Workspace& workspace) {
  if (a.m == 0) return;
  const int64_t shared = a.heads / a.kv_heads;
  // As many rows as fill the lanes once, or four times where many heads share a key and once would leave lanes empty.
  const int64_t lanes = kernels.query_lanes;
  const int64_t rows_together = std::max<int64_t>(1, (2 * shared > lanes ? 4 * lanes : lanes) / shared);
  const int64_t blocks = divide_up(a.m, rows_together);
  workspace.pool.run(a.kv_heads * blocks, [&](int64_t i, int thread) {
    // Late rows see most keys: they go first, so that the threads end together.
    const int64_t block = blocks - 1 - i / a.kv_heads, kv_head = i % a.kv_heads, first = block * rows_together;
    AttentionProduct p{};
    p.query_stride = a.heads * a.head_dim;
    p.queries = a.queries + first * p.query_stride + kv_head * shared * a.head_dim;
    p.outputs = a.outputs + first * p.query_stride + kv_head * shared * a.head_dim;
    p.rows = std::min(rows_together, a.m - first);
    p.heads = shared;
    p.head_dim = a.head_dim;
    p.key_pages = a.key_pages;
    p.value_pages = a.value_pages;
    p.head_offset = kv_head * a.head_dim;
    p.page_tokens = a.page_tokens;
    p.token_stride = a.kv_heads * a.head_dim;
    p.key_scale = a.key_scale;
    p.value_scale = a.value_scale;
    p.softmax_scale = a.softmax_scale;
    p.softcap = a.softcap;
    p.first_position = a.first_position + first;
    p.window = a.window;
    p.alibi_slopes = a.alibi_slopes ? a.alibi_slopes + kv_head * shared : nullptr;
    p.scratch = workspace.scratch[thread].reserve_array<float>(kernels.attention_scratch(shared, a.head_dim));
    kernels.attend(p);
  });
}

void measure_read(const Kernels& kernels, const uint8_t* data, int64_t bytes, Workspace& workspace) {
  if (bytes <= 0) return;
  constexpr int64_t kPieces = 64, kLine = 256;
  const int64_t piece = divide_up(divide_up(bytes, kPieces), kLine) * kLine;
  workspace.pool.run(divide_up(bytes, piece),
                     [&](int64_t i, int) { kernels.read(data + i * piece, std::min(piece, bytes - i * piece)); });
}

int64_t measure_dot(const Kernels& kernels, int64_t steps, Workspace& workspace) {
  std::atomic<int64_t> operations = 0;
  workspace.pool.run(workspace.pool.threads(), [&](int64_t, int) { operations += kernels.dot(steps); });
  return operations;
}

}  // namespace fptq
