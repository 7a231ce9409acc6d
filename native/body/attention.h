// Attention over an int8 cache.

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
    float* to = a.outputs + row * a.output_stride + head * d;
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
    float* to = a.outputs + row * a.output_stride + h * d;
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
