#include "operators.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

namespace fptq {
namespace {

// Bytes of unpacked codes that rows are multiplied with before the next ones are unpacked.
constexpr int64_t kPanelBytes = 128 * 1024;

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

namespace {

// Four nibbles of the lower 16 bits, a byte each.
uint32_t spread(uint32_t nibbles) {
  const uint32_t pairs = (nibbles | nibbles << 8) & 0x00FF00FFu;
  return (pairs | pairs << 4) & 0x0F0F0F0Fu;
}

}  // namespace

void pack_words(const Shape& shape, const uint32_t* words, const uint16_t* scales, uint8_t* packed, Pool& pool) {
  const int64_t groups = shape.groups(), steps = shape.group_steps();
  const auto* const bytes = reinterpret_cast<const uint8_t*>(words);
  pool.run(shape.panels(), [&](int64_t panel, int) {
    const int64_t first = panel * kPanelChannels, channels = std::min<int64_t>(kPanelChannels, shape.n - first);
    const auto step_of = [&](int64_t channel, int64_t step) -> uint32_t {
      if (channel >= channels) return 0x8888u;  // four codes of 0
      uint16_t codes;
      std::memcpy(&codes, bytes + (first + channel) * shape.k / 2 + step * 2, 2);
      return codes;
    };
    uint8_t* out = packed + panel * shape.panel_bytes();
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t s = g * steps; s < (g + 1) * steps; ++s) {
        for (int64_t l = 0; l < kPanelChannels / 2; ++l, out += kStepInputs) {
          const uint32_t both = spread(step_of(l, s)) | spread(step_of(l + 16, s)) << 4;
          std::memcpy(out, &both, kStepInputs);
        }
      }
      for (int64_t c = 0; c < kPanelChannels; ++c, out += 2) {
        const uint16_t scale = c < channels ? scales[(first + c) * groups + g] : uint16_t{0};
        std::memcpy(out, &scale, 2);
      }
    }
  });
}

void pack_floats(const Shape& shape, const uint8_t* weights, uint8_t* packed, Pool& pool) {
  const int64_t size = static_cast<int>(shape.type) / 8;
  pool.run(shape.panels(), [&](int64_t panel, int) {
    const int64_t first = panel * kPanelChannels, channels = std::min<int64_t>(kPanelChannels, shape.n - first);
    uint8_t* const out = packed + panel * shape.panel_bytes();
    if (channels < kPanelChannels) std::memset(out, 0, static_cast<size_t>(shape.panel_bytes()));
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < shape.k; ++i)
        std::memcpy(out + (i * kPanelChannels + c) * size, weights + ((first + c) * shape.k + i) * size, size);
  });
}

float quantize_row(const Kernels& kernels, const float* x, int64_t k, std::optional<float> scale, int8_t* codes) {
  if (!scale) return kernels.quantize_dynamic(x, k, codes);
  return kernels.quantize(x, k, *scale, codes) ? *scale : kNan;
}

void multiply_tiles(const Kernels& kernels, const Shape& shape, const uint8_t* packed, const Tiles& tiles,
                    const float* bias, float* y, int64_t stride, Workspace& workspace) {
  const int64_t n = shape.n, groups = shape.groups(), panels = shape.panels();
  const int64_t threads = workspace.pool.threads();
  // With many tiles it may pay to take the nibbles apart once for all of them.
  const bool unpack = shape.type == WeightType::int4 && tiles.count > kernels.tiles_from_nibbles;
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
        p.activations = tiles.codes;
        p.corrections = tiles.corrections;
        p.rows = tiles.rows;
        p.tiles = tiles.count;
        p.add = first > 0;
        p.activation_scales = first + p.groups == groups ? tiles.scales : nullptr;
        p.bias = bias ? bias + panel * kPanelChannels : nullptr;
        p.sums = y + panel * kPanelChannels;
        p.sums_stride = stride;
        p.channels = static_cast<int>(std::min<int64_t>(kPanelChannels, n - panel * kPanelChannels));
        kernels.multiply(p);
      }
    }
  });
}

void multiply_floats(const Kernels& kernels, const Shape& shape, const uint8_t* packed, int64_t rows, const float* x,
                     const float* bias, float* y, int64_t stride, Workspace& workspace) {
  const int64_t panels = shape.panels();
  const int64_t panels_together = std::max<int64_t>(1, panels / (workspace.pool.threads() * 8));
  workspace.pool.run(divide_up(panels, panels_together), [&](int64_t i, int) {
    for (int64_t panel = i * panels_together; panel < std::min(panels, (i + 1) * panels_together); ++panel) {
      kernels.multiply_float(
          {.weights = packed + panel * shape.panel_bytes(),
           .type = shape.type,
           .k = shape.k,
           .x = x,
           .rows = rows,
           .bias = bias ? bias + panel * kPanelChannels : nullptr,
           .y = y + panel * kPanelChannels,
           .stride = stride,
           .channels = static_cast<int>(std::min<int64_t>(kPanelChannels, shape.n - panel * kPanelChannels))});
    }
  });
}

void multiply(const Kernels& kernels, const Shape& shape, const uint8_t* packed, int64_t m, const int8_t* activations,
              const float* activation_scales, const float* bias, float* y, Workspace& workspace) {
  for (int64_t start = 0; start < m; start += kRowBlock) {
    const auto fill = [&](int64_t row, int8_t* codes, float*) {
      std::copy_n(activations + (start + row) * shape.k, shape.k, codes);
      return activation_scales[start + row];
    };
    const Tiles tiles = prepare(kernels, shape, std::min(kRowBlock, m - start), fill, workspace);
    multiply_tiles(kernels, shape, packed, tiles, bias, y + start * shape.n, shape.n, workspace);
  }
}

void linear(const Kernels& kernels, const Shape& shape, const uint8_t* packed, int64_t m, const float* x,
            std::optional<float> scale, const float* bias, float* y, Workspace& workspace) {
  for (int64_t start = 0; start < m; start += kRowBlock) {
    const auto fill = [&](int64_t row, int8_t* codes, float*) {
      return quantize_row(kernels, x + (start + row) * shape.k, shape.k, scale, codes);
    };
    const Tiles tiles = prepare(kernels, shape, std::min(kRowBlock, m - start), fill, workspace);
    multiply_tiles(kernels, shape, packed, tiles, bias, y + start * shape.n, shape.n, workspace);
  }
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

float normalize_quantize_row(const Kernels& kernels, const float* x, int64_t k, const Norm& norm,
                             std::optional<float> scale, int8_t* codes, float* scratch) {
  if (scale) return kernels.normalize_quantize(x, k, norm, *scale, codes) ? *scale : kNan;
  kernels.normalize(x, k, norm, scratch);
  return kernels.quantize_dynamic(scratch, k, codes);
}

void normalize_quantize(const Kernels& kernels, const float* x, int64_t m, int64_t k, const Norm& norm,
                        std::optional<float> scale, int8_t* codes, float* scales, Workspace& workspace) {
  for_rows(m, k, workspace, [&](int64_t row, int thread) {
    auto* const scratch = workspace.scratch[thread].reserve_array<float>(k);
    scales[row] = normalize_quantize_row(kernels, x + row * k, k, norm, scale, codes + row * k, scratch);
  });
}

void round_in_turn(const Kernels& kernels, int64_t columns, int64_t rows, const float* values, const float* steps,
                   const float* factor, int bits, int8_t* codes, float* errors, Workspace& workspace) {
  const auto levels = static_cast<float>(int64_t{1} << (bits - 1));
  workspace.pool.run(divide_up(rows, kRoundingRows), [&](int64_t i, int thread) {
    const int64_t first = i * kRoundingRows;
    kernels.round_in_turn({.values = values + first,
                           .steps = steps + first,
                           .factor = factor,
                           .columns = columns,
                           .rows = std::min(kRoundingRows, rows - first),
                           .stride = rows,
                           .lowest = -levels,
                           .highest = levels - 1,
                           .codes = codes + first,
                           .errors = errors + first,
                           .scratch = workspace.scratch[thread].reserve_array<float>(columns * kRoundingRows)});
  });
}

int64_t rows_together(const Kernels& kernels, const Attention& a) {
  // As many rows as fill the lanes once, or four times where many heads share a key and once would leave lanes empty.
  const int64_t shared = a.heads / a.kv_heads, lanes = kernels.query_lanes;
  return std::max<int64_t>(1, (2 * shared > lanes ? 4 * lanes : lanes) / shared);
}

void attend_part(const Kernels& kernels, const Attention& a, const AttentionPart& part, Buffer& scratch) {
  const int64_t head = part.kv_head * (a.heads / a.kv_heads) + part.first_head;
  kernels.attend({.queries = a.queries + part.first * a.query_stride + head * a.head_dim,
                  .outputs = a.outputs + part.first * a.output_stride + head * a.head_dim,
                  .query_stride = a.query_stride,
                  .output_stride = a.output_stride,
                  .rows = part.rows,
                  .heads = part.heads,
                  .head_dim = a.head_dim,
                  .key_pages = a.key_pages,
                  .value_pages = a.value_pages,
                  .head_offset = part.kv_head * a.page_tokens * a.head_dim,
                  .page_tokens = a.page_tokens,
                  .key_scale = a.key_scale,
                  .value_scale = a.value_scale,
                  .softmax_scale = a.softmax_scale,
                  .softcap = a.softcap,
                  .first_position = a.first_position + part.first,
                  .window = a.window,
                  .alibi_slopes = a.alibi_slopes ? a.alibi_slopes + head : nullptr,
                  .scratch = scratch.reserve_array<float>(kernels.attention_scratch(part.heads, a.head_dim))});
}

void attend(const Kernels& kernels, const Attention& a, Workspace& workspace) {
  const int64_t together = rows_together(kernels, a), blocks = divide_up(a.m, together);
  workspace.pool.run(a.kv_heads * blocks, [&](int64_t i, int thread) {
    // Late rows see most keys: they go first, so that the threads end together.
    const int64_t first = (blocks - 1 - i / a.kv_heads) * together;
    const AttentionPart part{i % a.kv_heads, 0, a.heads / a.kv_heads, first, std::min(together, a.m - first)};
    attend_part(kernels, a, part, workspace.scratch[thread]);
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
