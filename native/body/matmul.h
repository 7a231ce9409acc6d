// Products with packed weights: the inner loop, tails, and bringing both operands into their layouts.

template <class Isa>
inline constexpr int kVectors = kPanelChannels / Isa::kLanes;

constexpr int kPrefetchBytes = 8192;  // ahead in the stream of weights

// Weights that are prefetched while a tile is multiplied: an address for each step.
struct Ahead {
  const uint8_t* first;
  int64_t step_stride;
  int64_t group_stride;
};

// With one tile, weights are used as they come from memory: those a little further on. With several, only the first
// tile waits for memory: every tile prefetches its share of the next panel.
inline Ahead look_ahead(const PanelProduct& p, int64_t tile) {
  const int64_t step_bytes = p.source == Source::wide ? 128 : 64;
  if (p.tiles == 1) return {p.codes + kPrefetchBytes, step_bytes, p.codes_stride};
  const int64_t share = p.groups * p.scales_stride / p.tiles;
  return {p.next_panel + tile * share, step_bytes / p.tiles, p.scales_stride / p.tiles};
}

// Σ over `groups` groups for R rows and the 32 channels of a panel. R·kVectors int32 sums stay in registers through a
// group; the float sums may live on the stack, touched once a group.
template <class Isa, int R, Source kSource>
void multiply_tile(const PanelProduct& p, const Ahead& ahead, const int8_t* activations, const int32_t* corrections,
                   const float* activation_scales, const float* bias, float* sums, int64_t stride) {
  constexpr int V = kVectors<Isa>;
  using Float = typename Isa::Float;
  Float total[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) total[r][v] = p.add ? Isa::load(sums + r * stride + v * Isa::kLanes) : Isa::splat(0.0f);
  for (int64_t g = 0; g < p.groups; ++g) {
    const uint8_t* codes = p.codes + g * p.codes_stride;
    const uint8_t* soon = ahead.first + g * ahead.group_stride;
    typename Isa::Int sum[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sum[r][v] = Isa::splat_int(kSource == Source::wide && Isa::kWideIsSigned ? 0 : corrections[g * R + r]);
    for (int64_t s = 0; s < p.steps; ++s) {
      typename Isa::Codes c[V];
      __builtin_prefetch(soon);
      if constexpr (kSource == Source::wide) __builtin_prefetch(soon + 64);
      soon += ahead.step_stride;
      if constexpr (kSource == Source::nibbles) {
        for (int v = 0; v < V / 2; ++v) Isa::load_nibbles(codes + v * Isa::kLanes * 4, c[v], c[v + V / 2]);
        codes += 64;
      } else {
        for (int v = 0; v < V; ++v) c[v] = Isa::load_bytes(codes + v * Isa::kLanes * 4);
        codes += 128;
      }
      for (int r = 0; r < R; ++r) {
        const auto step = Isa::load_step(activations + r * 4);
        for (int v = 0; v < V; ++v) Isa::template dot<kSource == Source::wide>(sum[r][v], c[v], step);
      }
      activations += R * 4;
    }
    const uint8_t* scales = p.scales + g * p.scales_stride;
    for (int v = 0; v < V; ++v) {
      const Float scale = Isa::load_scales(scales + v * Isa::kLanes * 2);
      for (int r = 0; r < R; ++r) total[r][v] = Isa::multiply_add(Isa::to_float(sum[r][v]), scale, total[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      Float y = total[r][v];
      if (activation_scales) y = Isa::multiply(y, Isa::splat(activation_scales[r]));
      if (bias) y = Isa::add(y, Isa::load(bias + v * Isa::kLanes));
      Isa::store(sums + r * stride + v * Isa::kLanes, y);
    }
  }
}

template <class Isa, Source kSource, int R = Isa::kRows>
void multiply_rows(int64_t rows, const PanelProduct& p, const Ahead& ahead, const int8_t* activations,
                   const int32_t* corrections, const float* activation_scales, const float* bias, float* sums,
                   int64_t stride) {
  if constexpr (R > 0) {
    if (rows == R)
      return multiply_tile<Isa, R, kSource>(p, ahead, activations, corrections, activation_scales, bias, sums, stride);
    multiply_rows<Isa, kSource, R - 1>(rows, p, ahead, activations, corrections, activation_scales, bias, sums, stride);
  }
}

template <class Isa>
void multiply(const PanelProduct& p) {
  float bias[kPanelChannels] = {};
  if (p.bias)
    for (int c = 0; c < p.channels; ++c) bias[c] = p.bias[c];
  const bool whole = p.channels == kPanelChannels;
  float edge[Isa::kRows * kPanelChannels];
  int64_t row = 0;
  for (int64_t tile = 0; tile < p.tiles; ++tile) {
    const int64_t rows = tile_rows(p.rows, p.tiles, tile);
    float* const out = p.sums + row * p.sums_stride;
    if (!whole && p.add)
      for (int64_t r = 0; r < rows; ++r)
        for (int c = 0; c < p.channels; ++c) edge[r * kPanelChannels + c] = out[r * p.sums_stride + c];
    const auto multiply_some = p.source == Source::nibbles ? multiply_rows<Isa, Source::nibbles>
                               : p.source == Source::bytes ? multiply_rows<Isa, Source::bytes>
                                                           : multiply_rows<Isa, Source::wide>;
    const int64_t before = row * p.all_groups + p.first_group * rows;  // groups of rows before this tile's first
    multiply_some(rows, p, look_ahead(p, tile), p.activations + before * p.steps * kStepInputs, p.corrections + before,
                  p.activation_scales ? p.activation_scales + row : nullptr,
                  p.activation_scales && p.bias ? bias : nullptr, whole ? out : edge,
                  whole ? p.sums_stride : kPanelChannels);
    if (!whole)
      for (int64_t r = 0; r < rows; ++r)
        for (int c = 0; c < p.channels; ++c) out[r * p.sums_stride + c] = edge[r * kPanelChannels + c];
    row += rows;
  }
}

// Steps of R rows side by side: R loads, and stores to consecutive places.
template <int R>
void interleave(const int8_t* rows, int64_t stride, int64_t steps, int8_t* tile) {
  for (int64_t s = 0; s < steps; ++s, rows += kStepInputs, tile += R * kStepInputs)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) __builtin_memcpy(tile + r * kStepInputs, rows + r * stride, kStepInputs);
}

template <int R>
void interleave_rows(int64_t count, const int8_t* rows, int64_t stride, int64_t steps, int8_t* tile) {
  if constexpr (R > 0) {
    if (count == R) return interleave<R>(rows, stride, steps, tile);
    interleave_rows<R - 1>(count, rows, stride, steps, tile);
  }
}

template <class Isa>
void pack_tile(const Shape& shape, int64_t rows, const int8_t* activations, int8_t* tile, int32_t* corrections) {
  const int64_t size = shape.group_size, steps = shape.group_steps(), whole = size / kStepInputs;
  for (int64_t g = 0; g < shape.groups(); ++g, activations += size, tile += steps * rows * kStepInputs) {
    interleave_rows<Isa::kRows>(rows, activations, shape.k, whole, tile);
    for (int64_t r = 0; r < rows; ++r) {
      const int8_t* row = activations + r * shape.k;
      if (whole < steps)
        for (int64_t j = 0; j < kStepInputs; ++j)
          tile[(whole * rows + r) * kStepInputs + j] =
              whole * kStepInputs + j < size ? row[whole * kStepInputs + j] : 0;
      int32_t sum = 0;
      for (int64_t i = 0; i < size; ++i) sum += row[i];
      corrections[g * rows + r] = -shape.offset() * sum;
    }
  }
}

template <class Isa>
void unpack(const uint8_t* codes, int64_t codes_stride, int64_t groups, int64_t steps, uint8_t* bytes) {
  constexpr int V = kVectors<Isa>;
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* from = codes + g * codes_stride;
    for (int64_t s = 0; s < steps; ++s, from += 64, bytes += 128) {
      for (int v = 0; v < V / 2; ++v) {
        typename Isa::Codes low, high;
        Isa::load_nibbles(from + v * Isa::kLanes * 4, low, high);
        Isa::store_bytes(bytes + v * Isa::kLanes * 4, low);
        Isa::store_bytes(bytes + (v + V / 2) * Isa::kLanes * 4, high);
      }
    }
  }
}

// R rows times a panel of float weights.
template <class Isa, int R, WeightType kType>
void multiply_float_tile(const FloatProduct& p, const float* x, const float* bias, float* y, int64_t stride) {
  constexpr int V = kVectors<Isa>, kBytes = static_cast<int>(kType) / 8;
  typename Isa::Float sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = Isa::load(bias + v * Isa::kLanes);
  const uint8_t* weights = p.weights;
  for (int64_t i = 0; i < p.k; ++i, weights += kPanelChannels * kBytes) {
    for (int b = 0; b < kPanelChannels * kBytes; b += 64) __builtin_prefetch(weights + kPrefetchBytes + b);
    typename Isa::Float w[V];
    for (int v = 0; v < V; ++v) {
      if constexpr (kType == WeightType::bfloat16) {
        w[v] = Isa::load_scales(weights + v * Isa::kLanes * kBytes);
      } else {
        w[v] = Isa::load(reinterpret_cast<const float*>(weights) + v * Isa::kLanes);
      }
    }
    for (int r = 0; r < R; ++r) {
      const auto factor = Isa::splat(x[r * p.k + i]);
      for (int v = 0; v < V; ++v) sum[r][v] = Isa::multiply_add(w[v], factor, sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) Isa::store(y + r * stride + v * Isa::kLanes, sum[r][v]);
}

template <class Isa, WeightType kType, int R = Isa::kRows>
void multiply_float_rows(int64_t rows, const FloatProduct& p, const float* x, const float* bias, float* y,
                         int64_t stride) {
  if constexpr (R > 0) {
    if (rows == R) return multiply_float_tile<Isa, R, kType>(p, x, bias, y, stride);
    multiply_float_rows<Isa, kType, R - 1>(rows, p, x, bias, y, stride);
  }
}

template <class Isa>
void multiply_float(const FloatProduct& p) {
  float bias[kPanelChannels] = {};
  if (p.bias)
    for (int c = 0; c < p.channels; ++c) bias[c] = p.bias[c];
  const bool whole = p.channels == kPanelChannels;
  float edge[Isa::kRows * kPanelChannels];
  const auto multiply_some = p.type == WeightType::bfloat16 ? multiply_float_rows<Isa, WeightType::bfloat16>
                                                            : multiply_float_rows<Isa, WeightType::float32>;
  for (int64_t row = 0; row < p.rows; row += Isa::kRows) {
    const int64_t rows = p.rows - row < Isa::kRows ? p.rows - row : Isa::kRows;
    float* const out = p.y + row * p.stride;
    multiply_some(rows, p, p.x + row * p.k, bias, whole ? out : edge, whole ? p.stride : kPanelChannels);
    if (!whole)
      for (int64_t r = 0; r < rows; ++r)
        for (int c = 0; c < p.channels; ++c) out[r * p.stride + c] = edge[r * kPanelChannels + c];
  }
}
