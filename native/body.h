// The kernels, written once. Every target's source file includes this inside its unnamed namespace, so that no function
// compiled for one instruction set can be linked into another. For the same reason nothing here may come from std.

template <class Isa>
inline constexpr int kVectors = kPanelChannels / Isa::kLanes;

constexpr int kPrefetchBytes = 4096;  // ahead in the stream of weights

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

// Calls function(first index, how many of its lanes are valid, vector) for every vector of a row; the last is padded.
template <class Isa, class Function>
void for_vectors(const float* x, int64_t k, const Function& function) {
  constexpr int L = Isa::kLanes;
  int64_t i = 0;
  for (; i + L <= k; i += L) function(i, L, Isa::load(x + i));
  if (i < k) {
    float rest[L] = {};
    for (int64_t j = i; j < k; ++j) rest[j - i] = x[j];
    function(i, static_cast<int>(k - i), Isa::load(rest));
  }
}

template <class Isa>
typename Isa::Float load_some(const float* x, int count) {
  if (count == Isa::kLanes) return Isa::load(x);
  float rest[Isa::kLanes] = {};
  for (int j = 0; j < count; ++j) rest[j] = x[j];
  return Isa::load(rest);
}

template <class Isa>
void store_some(float* out, int count, typename Isa::Float x) {
  if (count == Isa::kLanes) return Isa::store(out, x);
  float rest[Isa::kLanes];
  Isa::store(rest, x);
  for (int j = 0; j < count; ++j) out[j] = rest[j];
}

template <class Isa>
void store_codes(int8_t* out, int count, typename Isa::Float x) {
  if (count == Isa::kLanes) return Isa::store_int8(out, x);
  int8_t rest[Isa::kLanes];
  Isa::store_int8(rest, x);
  for (int j = 0; j < count; ++j) out[j] = rest[j];
}

// Whole numbers -128..127, or NaN where x is: max and min give the second operand if either is NaN.
template <class Isa>
typename Isa::Float to_code(typename Isa::Float x, typename Isa::Float scale) {
  return Isa::min(Isa::splat(127.0f), Isa::max(Isa::splat(-128.0f), Isa::round(Isa::divide(x, scale))));
}

// 0 if all lanes of everything added are finite, else NaN.
template <class Isa>
struct Finite {
  typename Isa::Float sum = Isa::splat(0.0f);
  void add(typename Isa::Float x) { sum = Isa::multiply_add(x, Isa::splat(0.0f), sum); }
  float result() const { return Isa::reduce_add(sum); }
};

template <class Isa>
bool quantize(const float* x, int64_t k, float scale, int8_t* codes) {
  const auto step = Isa::splat(scale);
  Finite<Isa> finite;
  for_vectors<Isa>(x, k, [&](int64_t i, int count, typename Isa::Float v) {
    const auto code = to_code<Isa>(v, step);
    finite.add(code);
    store_codes<Isa>(codes + i, count, code);
  });
  return finite.result() == 0.0f;
}

template <class Isa>
float quantize_dynamic(const float* x, int64_t k, int8_t* codes) {
  auto largest = Isa::splat(0.0f);
  Finite<Isa> finite;
  for_vectors<Isa>(x, k, [&](int64_t, int, typename Isa::Float v) {
    largest = Isa::max(largest, Isa::absolute(v));
    finite.add(v);
  });
  float scale = Isa::reduce_max(largest) / 127.0f;
  if (!(scale > 0.0f)) scale = 1.0f;
  quantize<Isa>(x, k, scale, codes);
  return scale + finite.result();
}

// Hands function(i, count, y) the normalized row, vector by vector.
template <class Isa, class Function>
void normalized(const float* x, int64_t k, const Norm& norm, const Function& function) {
  using Float = typename Isa::Float;
  float mean = 0.0f;
  if (norm.center) {
    Float sum = Isa::splat(0.0f);
    for_vectors<Isa>(x, k, [&](int64_t, int, Float v) { sum = Isa::add(sum, v); });
    mean = Isa::reduce_add(sum) / static_cast<float>(k);
  }
  const Float center = Isa::splat(mean);
  Float squares = Isa::splat(0.0f);
  for_vectors<Isa>(x, k, [&](int64_t, int count, Float v) {
    Float d = Isa::subtract(v, center);
    if (count < Isa::kLanes) {  // the padding isn't at the mean
      float some[Isa::kLanes] = {};
      store_some<Isa>(some, count, d);
      d = Isa::load(some);
    }
    squares = Isa::multiply_add(d, d, squares);
  });
  const Float r = Isa::splat(1.0f / __builtin_sqrtf(Isa::reduce_add(squares) / static_cast<float>(k) + norm.eps));
  for_vectors<Isa>(x, k, [&](int64_t i, int count, Float v) {
    Float y = Isa::multiply(Isa::multiply(Isa::subtract(v, center), r), load_some<Isa>(norm.weight + i, count));
    if (norm.bias) y = Isa::add(y, load_some<Isa>(norm.bias + i, count));
    function(i, count, y);
  });
}

template <class Isa>
void normalize(const float* x, int64_t k, const Norm& norm, float* out) {
  normalized<Isa>(x, k, norm, [&](int64_t i, int count, typename Isa::Float y) { store_some<Isa>(out + i, count, y); });
}

template <class Isa>
bool normalize_quantize(const float* x, int64_t k, const Norm& norm, float scale, int8_t* codes) {
  const auto step = Isa::splat(scale);
  Finite<Isa> finite;
  normalized<Isa>(x, k, norm, [&](int64_t i, int count, typename Isa::Float y) {
    const auto code = to_code<Isa>(y, step);
    finite.add(code);
    store_codes<Isa>(codes + i, count, code);
  });
  return finite.result() == 0.0f;
}

// e^x for x <= 88, 0 below -87.3; relative error below 2^-22: x = n·ln 2 + r, |r| <= ln 2 / 2, Taylor to r^6 / 720.
template <class Isa>
typename Isa::Float exponential(typename Isa::Float x) {
  using Float = typename Isa::Float;
  const Float lowest = Isa::splat(-87.3f);
  const Float y = Isa::max(lowest, x);
  const Float n = Isa::round(Isa::multiply(y, Isa::splat(1.44269504f)));
  Float r = Isa::multiply_add(n, Isa::splat(-0.693359375f), y);  // ln 2 in two parts, the first exact times n
  r = Isa::multiply_add(n, Isa::splat(2.12194440e-4f), r);
  Float sum = Isa::splat(1.0f / 720);
  constexpr float kTaylor[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float c : kTaylor) sum = Isa::multiply_add(sum, r, Isa::splat(c));
  return Isa::where_less(x, lowest, Isa::splat(0.0f), Isa::multiply(sum, Isa::power_of_two(n)));
}

template <class Isa>
typename Isa::Float hyperbolic_tangent(typename Isa::Float x) {
  const auto limited = Isa::min(Isa::splat(15.0f), Isa::max(Isa::splat(-15.0f), x));
  const auto e = exponential<Isa>(Isa::add(limited, limited));
  const auto one = Isa::splat(1.0f);
  return Isa::divide(Isa::subtract(e, one), Isa::add(e, one));
}

constexpr float kNoScore = -1e30f;  // below every score, and finite: a difference of two isn't NaN

// Consecutive keys from `position` on, up to `end`, that lie in one page and one block.
inline int64_t page_rows(const AttentionProduct& a, int64_t position, int64_t end) {
  const int64_t rest = a.page_tokens - position % a.page_tokens;
  const int64_t count = end - position < rest ? end - position : rest;
  return count < kKeyBlock ? count : kKeyBlock;
}

inline const int8_t* row_of(const AttentionProduct& a, const int8_t* const* pages, int64_t position) {
  return pages[position / a.page_tokens] + position % a.page_tokens * a.token_stride + a.head_offset;
}

template <class Isa>
void load_codes(const int8_t* codes, int64_t count, float* out) {
  constexpr int L = Isa::kLanes;
  int64_t i = 0;
  for (; i + L <= count; i += L) Isa::store(out + i, Isa::load_int8(codes + i));
  for (; i < count; ++i) out[i] = codes[i];
}

// A block of keys or values as floats, rows `width` apart, and its place in the next block prefetched.
template <class Isa>
void load_block(const AttentionProduct& a, const int8_t* codes, int64_t count, int64_t width, float* rows) {
  for (int64_t t = 0; t < count; ++t, codes += a.token_stride) {
    for (int64_t i = 0; i < a.head_dim; i += 64) __builtin_prefetch(codes + count * a.token_stride + i);
    load_codes<Isa>(codes, a.head_dim, rows + t * width);
  }
}

// Attention with the queries in the lanes: two vectors of them at a time. Scores, softmax and outputs need no sum
// across lanes then. Online softmax over blocks of keys.
template <class Isa>
void attend_lanes(const AttentionProduct& a, int64_t first_query, int64_t queries) {
  using Float = typename Isa::Float;
  constexpr int L = Isa::kLanes, W = 2 * L, T = Isa::kAttentionTile;
  const int64_t d = a.head_dim;
  float* const q = a.scratch;             // [d][W]
  float* const out = q + d * W;           // [d][W]
  float* const p = out + d * W;           // [kKeyBlock][W]
  float* const rows = p + kKeyBlock * W;  // [kKeyBlock][d]
  float position[W], slope[W];
  int64_t earliest = -1, latest = -1;
  for (int64_t w = 0; w < W; ++w) {
    const int64_t query = first_query + (w < queries ? w : 0);
    const int64_t row = query / a.heads, head = query % a.heads, at = a.first_position + row;
    if (w == 0) earliest = at;
    if (at > latest) latest = at;
    position[w] = static_cast<float>(row);  // relative to the first: exact however long the sequence is
    slope[w] = a.alibi_slopes ? a.alibi_slopes[head] : 0.0f;
    const float* from = a.queries + row * a.query_stride + head * d;
    for (int64_t i = 0; i < d; ++i) {
      q[i * W + w] = from[i] * a.softmax_scale * a.key_scale;
      out[i * W + w] = 0.0f;
    }
  }
  Float largest[2] = {Isa::splat(kNoScore), Isa::splat(kNoScore)}, total[2] = {Isa::splat(0.0f), Isa::splat(0.0f)};
  const int64_t begin = a.window && earliest - a.window + 1 > 0 ? earliest - a.window + 1 : 0;
  for (int64_t start = begin, count; start <= latest; start += count) {
    count = page_rows(a, start, latest + 1);
    load_block<Isa>(a, row_of(a, a.key_pages, start), count, d, rows);
    const int64_t padded = (count + T - 1) / T * T;
    for (int64_t t = count; t < padded; ++t)
      for (int64_t i = 0; i < d; ++i) rows[t * d + i] = 0.0f;
    for (int64_t t = 0; t < padded; t += T) {
      Float sum[T][2];
      for (int j = 0; j < T; ++j) sum[j][0] = sum[j][1] = Isa::splat(0.0f);
      const float* key = rows + t * d;
      for (int64_t i = 0; i < d; ++i) {
        const Float q0 = Isa::load(q + i * W), q1 = Isa::load(q + i * W + L);
        for (int j = 0; j < T; ++j) {
          const Float k = Isa::splat(key[j * d + i]);
          sum[j][0] = Isa::multiply_add(q0, k, sum[j][0]);
          sum[j][1] = Isa::multiply_add(q1, k, sum[j][1]);
        }
      }
      for (int j = 0; j < T; ++j) {
        Isa::store(p + (t + j) * W, sum[j][0]);
        Isa::store(p + (t + j) * W + L, sum[j][1]);
      }
    }
    const bool masked = start + count - 1 > earliest || (a.window && start <= latest - a.window);
    Float change[2];
    for (int v = 0; v < 2; ++v) {
      const Float at = Isa::load(position + v * L);
      const Float first = Isa::subtract(at, Isa::splat(a.window ? static_cast<float>(a.window - 1) : 1e30f));
      Float now = largest[v];
      for (int64_t t = 0; t < count; ++t) {
        Float s = Isa::load(p + t * W + v * L);
        const Float key_at = Isa::splat(static_cast<float>(start + t - a.first_position));
        if (a.softcap != 0.0f)
          s = Isa::multiply(Isa::splat(a.softcap), hyperbolic_tangent<Isa>(Isa::divide(s, Isa::splat(a.softcap))));
        if (a.alibi_slopes) s = Isa::multiply_add(Isa::load(slope + v * L), Isa::subtract(key_at, at), s);
        if (masked) {
          s = Isa::where_less(at, key_at, Isa::splat(2 * kNoScore), s);
          s = Isa::where_less(key_at, first, Isa::splat(2 * kNoScore), s);
        }
        Isa::store(p + t * W + v * L, s);
        now = Isa::max(now, s);
      }
      change[v] = exponential<Isa>(Isa::subtract(largest[v], now));
      largest[v] = now;
      Float sum = Isa::splat(0.0f);
      for (int64_t t = 0; t < count; ++t) {
        const Float e = exponential<Isa>(Isa::subtract(Isa::load(p + t * W + v * L), now));
        Isa::store(p + t * W + v * L, e);
        sum = Isa::add(sum, e);
      }
      total[v] = Isa::multiply_add(total[v], change[v], sum);
    }
    load_block<Isa>(a, row_of(a, a.value_pages, start), count, d, rows);
    int64_t i = 0;
    for (; i + T <= d; i += T) {
      Float sum[T][2];
      for (int j = 0; j < T; ++j)
        for (int v = 0; v < 2; ++v) sum[j][v] = Isa::multiply(Isa::load(out + (i + j) * W + v * L), change[v]);
      for (int64_t t = 0; t < count; ++t) {
        const Float p0 = Isa::load(p + t * W), p1 = Isa::load(p + t * W + L);
        for (int j = 0; j < T; ++j) {
          const Float value = Isa::splat(rows[t * d + i + j]);
          sum[j][0] = Isa::multiply_add(p0, value, sum[j][0]);
          sum[j][1] = Isa::multiply_add(p1, value, sum[j][1]);
        }
      }
      for (int j = 0; j < T; ++j)
        for (int v = 0; v < 2; ++v) Isa::store(out + (i + j) * W + v * L, sum[j][v]);
    }
    for (; i < d; ++i) {
      for (int v = 0; v < 2; ++v) {
        Float sum = Isa::multiply(Isa::load(out + i * W + v * L), change[v]);
        for (int64_t t = 0; t < count; ++t)
          sum = Isa::multiply_add(Isa::load(p + t * W + v * L), Isa::splat(rows[t * d + i]), sum);
        Isa::store(out + i * W + v * L, sum);
      }
    }
  }
  float totals[W];
  for (int v = 0; v < 2; ++v) Isa::store(totals + v * L, total[v]);
  for (int64_t w = 0; w < queries; ++w) {
    const int64_t row = (first_query + w) / a.heads, head = (first_query + w) % a.heads;
    float* to = a.outputs + row * a.query_stride + head * d;
    const float factor = a.value_scale / totals[w];
    for (int64_t i = 0; i < d; ++i) to[i] = out[i * W + w] * factor;
  }
}

// Attention of a single row's query heads, with head_dim in the lanes: what decoding needs. Every key and value row is
// read once for all heads that share it.
template <class Isa>
void attend_row(const AttentionProduct& a, int64_t row) {
  using Float = typename Isa::Float;
  constexpr int L = Isa::kLanes, C = 4;
  const int64_t d = a.head_dim, width = (d + C * L - 1) / (C * L) * (C * L);
  const int64_t heads = a.heads, at = a.first_position + row;
  float* const q = a.scratch;                       // [heads][width]
  float* const out = q + heads * width;             // [heads][width]
  float* const p = out + heads * width;             // [heads][kKeyBlock]
  float* const rows = p + heads * kKeyBlock;        // [kKeyBlock][width]
  float* const largest = rows + kKeyBlock * width;  // [heads]
  float* const total = largest + heads;             // [heads]
  for (int64_t h = 0; h < heads; ++h) {
    const float* from = a.queries + row * a.query_stride + h * d;
    for (int64_t i = 0; i < width; ++i) {
      q[h * width + i] = i < d ? from[i] * a.softmax_scale * a.key_scale : 0.0f;
      out[h * width + i] = 0.0f;
    }
    largest[h] = kNoScore;
    total[h] = 0.0f;
  }
  for (int64_t t = 0; t < kKeyBlock; ++t)
    for (int64_t i = d; i < width; ++i) rows[t * width + i] = 0.0f;
  const int64_t begin = a.window && at - a.window + 1 > 0 ? at - a.window + 1 : 0;
  for (int64_t start = begin, count; start <= at; start += count) {
    count = page_rows(a, start, at + 1);
    load_block<Isa>(a, row_of(a, a.key_pages, start), count, width, rows);
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t t = 0; t < count; ++t) {
        Float even = Isa::splat(0.0f), odd = even;
        for (int64_t i = 0; i < width; i += 2 * L) {
          even = Isa::multiply_add(Isa::load(q + h * width + i), Isa::load(rows + t * width + i), even);
          odd = Isa::multiply_add(Isa::load(q + h * width + i + L), Isa::load(rows + t * width + i + L), odd);
        }
        p[h * kKeyBlock + t] = Isa::reduce_add(Isa::add(even, odd));
      }
    }
    load_block<Isa>(a, row_of(a, a.value_pages, start), count, width, rows);
    for (int64_t h = 0; h < heads; ++h) {
      float* const scores = p + h * kKeyBlock;
      for (int64_t t = count; t % L; ++t) scores[t] = 2 * kNoScore;
      Float now = Isa::splat(largest[h]);
      for (int64_t t = 0; t < count; t += L) {
        Float s = Isa::load(scores + t);
        if (a.softcap != 0.0f) {
          const Float capped = hyperbolic_tangent<Isa>(Isa::divide(s, Isa::splat(a.softcap)));
          s = Isa::where_less(s, Isa::splat(kNoScore), s, Isa::multiply(Isa::splat(a.softcap), capped));
        }
        if (a.alibi_slopes) {
          float distance[L];
          for (int j = 0; j < L; ++j) distance[j] = static_cast<float>(start + t + j - at);
          s = Isa::multiply_add(Isa::splat(a.alibi_slopes[h]), Isa::load(distance), s);
        }
        Isa::store(scores + t, s);
        now = Isa::max(now, s);
      }
      const float highest = Isa::reduce_max(now);
      const float change = __builtin_expf(largest[h] - highest);
      largest[h] = highest;
      Float sum = Isa::splat(0.0f);
      for (int64_t t = 0; t < count; t += L) {
        const Float e = exponential<Isa>(Isa::subtract(Isa::load(scores + t), Isa::splat(highest)));
        Isa::store(scores + t, e);
        sum = Isa::add(sum, e);
      }
      total[h] = total[h] * change + Isa::reduce_add(sum);
      for (int64_t i = 0; i < width; i += C * L) {
        Float part[C];
        for (int c = 0; c < C; ++c) part[c] = Isa::multiply(Isa::load(out + h * width + i + c * L), Isa::splat(change));
        for (int64_t t = 0; t < count; ++t) {
          const Float weight = Isa::splat(scores[t]);
          for (int c = 0; c < C; ++c)
            part[c] = Isa::multiply_add(weight, Isa::load(rows + t * width + i + c * L), part[c]);
        }
        for (int c = 0; c < C; ++c) Isa::store(out + h * width + i + c * L, part[c]);
      }
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    float* to = a.outputs + row * a.query_stride + h * d;
    const float factor = a.value_scale / total[h];
    for (int64_t i = 0; i < d; ++i) to[i] = out[h * width + i] * factor;
  }
}

template <class Isa>
int64_t attention_scratch(int64_t heads, int64_t head_dim) {
  constexpr int64_t L = Isa::kLanes, W = 2 * L;
  const int64_t width = (head_dim + 4 * L - 1) / (4 * L) * (4 * L);
  const int64_t lanes = 2 * head_dim * W + kKeyBlock * W + kKeyBlock * head_dim;
  const int64_t row = (2 * heads + kKeyBlock) * width + heads * kKeyBlock + 2 * heads;
  return lanes > row ? lanes : row;
}

template <class Isa>
void attend(const AttentionProduct& a) {
  constexpr int64_t W = 2 * Isa::kLanes;
  const int64_t queries = a.rows * a.heads;
  if (2 * queries < W) {
    for (int64_t row = 0; row < a.rows; ++row) attend_row<Isa>(a, row);
  } else {
    for (int64_t first = 0; first < queries; first += W)
      attend_lanes<Isa>(a, first, queries - first < W ? queries - first : W);
  }
}

// Reads `bytes` bytes and returns something that depends on all of them: the memory's speed.
template <class Isa>
int64_t read(const uint8_t* data, int64_t bytes) {
  constexpr int64_t size = Isa::kLanes * 4;
  auto a = Isa::splat_int(0), b = a, c = a, d = a;
  for (int64_t i = 0; i + 4 * size <= bytes; i += 4 * size) {
    a = Isa::combine(a, Isa::load_bytes(data + i));
    b = Isa::combine(b, Isa::load_bytes(data + i + size));
    c = Isa::combine(c, Isa::load_bytes(data + i + 2 * size));
    d = Isa::combine(d, Isa::load_bytes(data + i + 3 * size));
  }
  const auto ab = Isa::add(Isa::to_float(a), Isa::to_float(b)), cd = Isa::add(Isa::to_float(c), Isa::to_float(d));
  return Isa::reduce_add(Isa::add(ab, cd)) != 0.0f;
}

// Runs `steps` × kChains independent dot instructions on registers and returns the multiplications and additions done.
template <class Isa>
int64_t dot(int64_t steps) {
  constexpr int kChains = 12;
  const uint8_t ones[Isa::kLanes * kStepInputs] = {1};
  const int8_t four[kStepInputs] = {1};
  auto codes = Isa::load_bytes(ones);
  const auto step = Isa::load_step(four);
  typename Isa::Int sum[kChains];
  typename Isa::Float total = Isa::splat(0.0f);
  // Unrolled, or the sums would be an array in memory.
#pragma GCC unroll 16
  for (int j = 0; j < kChains; ++j) sum[j] = Isa::splat_int(0);
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kChains; ++j) {
      Isa::hide(codes);  // from the compiler, which would take what is the same each time out of the loop
      Isa::template dot<false>(sum[j], codes, step);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kChains; ++j) total = Isa::add(total, Isa::to_float(sum[j]));
  return Isa::reduce_add(total) < 0 ? 0 : steps * kChains * Isa::kLanes * kStepInputs * 2;
}

template <class Isa>
constexpr Kernels kernels() {
  return {.name = Isa::kName,
          .rows = Isa::kRows,
          .tiles_from_nibbles = Isa::kTilesFromNibbles,
          .query_lanes = 2 * Isa::kLanes,
          .pack_tile = pack_tile<Isa>,
          .unpack = unpack<Isa>,
          .multiply = multiply<Isa>,
          .quantize = quantize<Isa>,
          .quantize_dynamic = quantize_dynamic<Isa>,
          .normalize = normalize<Isa>,
          .normalize_quantize = normalize_quantize<Isa>,
          .attention_scratch = attention_scratch<Isa>,
          .attend = attend<Isa>,
          .read = read<Isa>,
          .dot = dot<Isa>};
}
