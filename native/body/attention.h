// Attention over an int8 cache.

constexpr int kRowBlocks = 8;       // of keys, whose scores a single row has at a time
constexpr float kNoScore = -1e30f;  // below every score, and finite: a difference of two isn't NaN

// Both forms of attention below compute the same numbers, to the bit, for a query: the same blocks of keys, each
// operation in the same order. So a token's result doesn't depend on what else is computed with it.

// Where the block of keys begins that `position` is in. Blocks lie within pages.
inline int64_t block_start(const AttentionProduct& a, int64_t position) {
  return position - position % a.page_tokens % kKeyBlock;
}

// Consecutive keys from the beginning of a block on, up to `end`.
inline int64_t page_rows(const AttentionProduct& a, int64_t position, int64_t end) {
  const int64_t rest = a.page_tokens - position % a.page_tokens;
  const int64_t count = end - position < rest ? end - position : rest;
  return count < kKeyBlock ? count : kKeyBlock;
}

inline const int8_t* key_of(const AttentionProduct& a, int64_t position) {
  return a.key_pages[position / a.page_tokens] + a.head_offset + position % a.page_tokens;
}

inline const int8_t* value_of(const AttentionProduct& a, int64_t position) {
  return a.value_pages[position / a.page_tokens] + a.head_offset + position % a.page_tokens * a.head_dim;
}

template <class Isa>
void load_codes(const int8_t* codes, int64_t count, float* out) {
  constexpr int L = Isa::kLanes;
  int64_t i = 0;
  for (; i + L <= count; i += L) Isa::store(out + i, Isa::load_int8(codes + i));
  for (; i < count; ++i) out[i] = codes[i];
}

// Keys of one block as floats [head_dim, kKeyBlock].
template <class Isa>
void load_keys(const AttentionProduct& a, int64_t position, int64_t count, float* rows) {
  const int8_t* codes = key_of(a, position);
  for (int64_t i = 0; i < a.head_dim; ++i) load_codes<Isa>(codes + i * a.page_tokens, count, rows + i * kKeyBlock);
}

// Values of one block as floats [count, head_dim], and the next block's prefetched.
template <class Isa>
void load_values(const AttentionProduct& a, int64_t position, int64_t count, float* rows) {
  const int8_t* codes = value_of(a, position);
  for (int64_t t = 0; t < count; ++t, codes += a.head_dim) {
    for (int64_t i = 0; i < a.head_dim; i += 64) __builtin_prefetch(codes + count * a.head_dim + i);
    load_codes<Isa>(codes, a.head_dim, rows + t * a.head_dim);
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
  float* const rows = p + kKeyBlock * W;  // [d][kKeyBlock], then [kKeyBlock][d]
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
  for (int64_t start = block_start(a, begin), count; start <= latest; start += count) {
    count = page_rows(a, start, latest + 1);
    load_keys<Isa>(a, start, count, rows);
    const int64_t padded = (count + T - 1) / T * T;
    for (int64_t t = count; t < padded; ++t)
      for (int64_t i = 0; i < d; ++i) rows[i * kKeyBlock + t] = 0.0f;
    for (int64_t t = 0; t < padded; t += T) {
      Float sum[T][2];
      for (int j = 0; j < T; ++j) sum[j][0] = sum[j][1] = Isa::splat(0.0f);
      for (int64_t i = 0; i < d; ++i) {
        const Float q0 = Isa::load(q + i * W), q1 = Isa::load(q + i * W + L);
        for (int j = 0; j < T; ++j) {
          const Float k = Isa::splat(rows[i * kKeyBlock + t + j]);
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
      for (int64_t t = 0; t < count; ++t) {
        float* const at_key = p + t * W + v * L;
        Isa::store(at_key, exponential<Isa>(Isa::subtract(Isa::load(at_key), now)));
      }
      Float part[L];  // added up as reduce_add adds up a vector of keys
      for (int j = 0; j < L; ++j) {
        part[j] = Isa::splat(0.0f);
        for (int64_t t = j; t < count; t += L) part[j] = Isa::add(part[j], Isa::load(p + t * W + v * L));
      }
      for (int step = L / 2; step > 0; step /= 2)
        for (int j = 0; j < step; ++j) part[j] = Isa::add(part[j], part[j + step]);
      total[v] = Isa::multiply_add(total[v], change[v], part[0]);
    }
    load_values<Isa>(a, start, count, rows);
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

constexpr int64_t kRowKeys = kRowBlocks * kKeyBlock;

// Scores of H heads with V vectors of keys, whose codes are `stride` apart from channel to channel. `soon` is
// prefetched.
template <class Isa, int V, int H>
void score_keys(const float* q, int64_t width, int64_t d, const int8_t* codes, int64_t stride, const int8_t* soon,
                float* p) {
  typename Isa::Float sum[H][V];
  for (int h = 0; h < H; ++h)
    for (int v = 0; v < V; ++v) sum[h][v] = Isa::splat(0.0f);
  for (int64_t i = 0; i < d; ++i, codes += stride, soon += stride) {
    __builtin_prefetch(soon);
    typename Isa::Float k[V];
    for (int v = 0; v < V; ++v) k[v] = Isa::load_int8(codes + v * Isa::kLanes);
    for (int h = 0; h < H; ++h) {
      const auto factor = Isa::splat(q[h * width + i]);
      for (int v = 0; v < V; ++v) sum[h][v] = Isa::multiply_add(factor, k[v], sum[h][v]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int v = 0; v < V; ++v) Isa::store(p + h * kRowKeys + v * Isa::kLanes, sum[h][v]);
}

// out = out·change + Σ p·value over `count` tokens for H heads and V vectors of channels. `soon` is prefetched.
template <class Isa, int V, int H>
void add_values(const float* p, const float* change, int64_t count, const int8_t* codes, int64_t stride,
                const int8_t* soon, float* out, int64_t width) {
  typename Isa::Float sum[H][V];
  for (int h = 0; h < H; ++h)
    for (int v = 0; v < V; ++v)
      sum[h][v] = Isa::multiply(Isa::load(out + h * width + v * Isa::kLanes), Isa::splat(change[h * kRowBlocks]));
  for (int64_t t = 0; t < count; ++t, codes += stride, soon += stride) {
    __builtin_prefetch(soon);
    typename Isa::Float x[V];
    for (int v = 0; v < V; ++v) x[v] = Isa::load_int8(codes + v * Isa::kLanes);
    for (int h = 0; h < H; ++h) {
      const auto weight = Isa::splat(p[h * kRowKeys + t]);
      for (int v = 0; v < V; ++v) sum[h][v] = Isa::multiply_add(weight, x[v], sum[h][v]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int v = 0; v < V; ++v) Isa::store(out + h * width + v * Isa::kLanes, sum[h][v]);
}

// Calls function.template operator()<H>(first head) for all heads, H at most kMost together.
template <int kMost, class Function>
void for_heads(int64_t heads, const Function& function, int64_t first = 0) {
  for (; heads - first >= kMost; first += kMost) function.template operator()<kMost>(first);
  if constexpr (kMost > 1) {
    if (first < heads) for_heads<kMost - 1>(heads, function, first);
  }
}

// A vector of codes of which only `valid` may be read.
template <class Isa>
typename Isa::Float load_some_int8(const int8_t* codes, int64_t valid) {
  if (valid >= Isa::kLanes) return Isa::load_int8(codes);
  int8_t some[Isa::kLanes] = {};
  for (int64_t j = 0; j < valid; ++j) some[j] = codes[j];
  return Isa::load_int8(some);
}

struct KeyRange {
  int64_t first, count;
};

// Softmax of one head over blocks of keys, in place: for each block scores become e^(score - largest so far), and
// `change` is what everything before it has to be multiplied with. `largest` and `total` are kept up to date.
template <class Isa>
void soften(const AttentionProduct& a, int64_t h, int64_t at, int64_t seen, const KeyRange* blocks, int count,
            float* scores, float* change, float& largest, float& total) {
  using Float = typename Isa::Float;
  constexpr int L = Isa::kLanes;
  constexpr int kPadded = (kRowBlocks + L - 1) / L * L;
  float before[kPadded] = {}, after[kPadded] = {}, changes[kPadded];
  for (int b = 0; b < count; ++b) {
    float* const s = scores + b * kKeyBlock;
    const KeyRange block = blocks[b];
    for (int64_t j = 0; j < seen - block.first; ++j) s[j] = 2 * kNoScore;
    for (int64_t j = block.count; j % L; ++j) s[j] = 2 * kNoScore;
    Float now = Isa::splat(kNoScore);
    for (int64_t j = 0; j < block.count; j += L) {
      Float x = Isa::load(s + j);
      if (a.softcap != 0.0f) {
        const Float capped = hyperbolic_tangent<Isa>(Isa::divide(x, Isa::splat(a.softcap)));
        x = Isa::where_less(x, Isa::splat(kNoScore), x, Isa::multiply(Isa::splat(a.softcap), capped));
      }
      if (a.alibi_slopes) {
        float distance[L];
        for (int l = 0; l < L; ++l) distance[l] = static_cast<float>(block.first + j + l - at);
        x = Isa::multiply_add(Isa::splat(a.alibi_slopes[h]), Isa::load(distance), x);
      }
      Isa::store(s + j, x);
      now = Isa::max(now, x);
    }
    after[b] = Isa::reduce_max(now);
  }
  for (int b = 0; b < count; ++b) {
    before[b] = largest;
    if (after[b] < largest) after[b] = largest;
    largest = after[b];
  }
  for (int b = 0; b < kPadded; b += L)
    Isa::store(changes + b, exponential<Isa>(Isa::subtract(Isa::load(before + b), Isa::load(after + b))));
  Float sum_of_all = Isa::splat(total);
  for (int b = 0; b < count; ++b) {
    float* const s = scores + b * kKeyBlock;
    Float sum = Isa::splat(0.0f);
    for (int64_t j = 0; j < blocks[b].count; j += L) {
      const Float e = exponential<Isa>(Isa::subtract(Isa::load(s + j), Isa::splat(after[b])));
      Isa::store(s + j, e);
      sum = Isa::add(sum, e);
    }
    sum_of_all = Isa::multiply_add(sum_of_all, Isa::splat(changes[b]), Isa::splat(Isa::reduce_add(sum)));
    change[b] = changes[b];
  }
  total = Isa::reduce_max(sum_of_all);
}

// Attention of a single row's query heads: what decoding needs. Keys are in the lanes for the scores, channels for the
// outputs, so that nothing is added across lanes, and every code becomes a float once for all heads.
template <class Isa>
void attend_row(const AttentionProduct& a, int64_t row) {
  constexpr int L = Isa::kLanes, kHeads = Isa::kAttentionTile;
  const int64_t d = a.head_dim, width = (d + L - 1) / L * L;
  const int64_t heads = a.heads, at = a.first_position + row;
  float* const q = a.scratch;                          // [heads][width]
  float* const out = q + heads * width;                // [heads][width]
  float* const p = out + heads * width;                // [heads][kRowKeys]
  float* const change = p + heads * kRowKeys;          // [heads][kRowBlocks]
  float* const largest = change + heads * kRowBlocks;  // [heads]
  float* const total = largest + heads;                // [heads]
  for (int64_t h = 0; h < heads; ++h) {
    const float* from = a.queries + row * a.query_stride + h * d;
    for (int64_t i = 0; i < width; ++i) {
      q[h * width + i] = i < d ? from[i] * a.softmax_scale * a.key_scale : 0.0f;
      out[h * width + i] = 0.0f;
    }
    largest[h] = kNoScore;
    total[h] = 0.0f;
  }
  const int64_t seen = a.window && at - a.window + 1 > 0 ? at - a.window + 1 : 0;
  for (int64_t key = block_start(a, seen); key <= at;) {
    KeyRange blocks[kRowBlocks];
    int count = 0;
    for (; count < kRowBlocks && key <= at; key += blocks[count++].count)
      blocks[count] = {key, page_rows(a, key, at + 1)};
    for (int b = 0; b < count; ++b) {
      const int8_t* const codes = key_of(a, blocks[b].first);
      const int8_t* soon = b + 1 < count ? key_of(a, blocks[b + 1].first) : value_of(a, blocks[0].first);
      const int64_t side_by_side = a.page_tokens - blocks[b].first % a.page_tokens;
      float* const scores = p + b * kKeyBlock;
      int64_t t = 0;
      for (; t < blocks[b].count && t + 2 * L <= side_by_side; t += 2 * L, soon = codes)
        for_heads<kHeads>(heads, [&]<int H>(int64_t h) {
          score_keys<Isa, 2, H>(q + h * width, width, d, codes + t, a.page_tokens, soon, scores + h * kRowKeys + t);
        });
      for (; t < blocks[b].count; t += L) {
        for (int64_t h = 0; h < heads; ++h) {
          auto sum = Isa::splat(0.0f);
          for (int64_t i = 0; i < d; ++i) {
            const auto k = load_some_int8<Isa>(codes + i * a.page_tokens + t, side_by_side - t);
            sum = Isa::multiply_add(Isa::splat(q[h * width + i]), k, sum);
          }
          Isa::store(scores + h * kRowKeys + t, sum);
        }
      }
    }
    for (int64_t h = 0; h < heads; ++h)
      soften<Isa>(a, h, at, seen, blocks, count, p + h * kRowKeys, change + h * kRowBlocks, largest[h], total[h]);
    for (int b = 0; b < count; ++b) {
      const int8_t* const codes = value_of(a, blocks[b].first);
      const int8_t* const soon = b + 1 < count ? value_of(a, blocks[b + 1].first) : codes;
      const float* const weights = p + b * kKeyBlock;
      int64_t i = 0;
      for (; i + 2 * L <= d; i += 2 * L)
        for_heads<kHeads>(heads, [&]<int H>(int64_t h) {
          add_values<Isa, 2, H>(weights + h * kRowKeys, change + h * kRowBlocks + b, blocks[b].count, codes + i, d,
                                soon + i, out + h * width + i, width);
        });
      for (; i + L <= d; i += L)
        for_heads<kHeads>(heads, [&]<int H>(int64_t h) {
          add_values<Isa, 1, H>(weights + h * kRowKeys, change + h * kRowBlocks + b, blocks[b].count, codes + i, d,
                                soon + i, out + h * width + i, width);
        });
      if (i < d) {
        for (int64_t h = 0; h < heads; ++h) {
          auto sum = Isa::multiply(Isa::load(out + h * width + i), Isa::splat(change[h * kRowBlocks + b]));
          for (int64_t t = 0; t < blocks[b].count; ++t)
            sum = Isa::multiply_add(Isa::splat(weights[h * kRowKeys + t]),
                                    load_some_int8<Isa>(codes + t * d + i, d - i), sum);
          Isa::store(out + h * width + i, sum);
        }
      }
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    float* const to = a.outputs + row * a.output_stride + h * d;
    const float factor = a.value_scale / total[h];
    for (int64_t i = 0; i < d; ++i) to[i] = out[h * width + i] * factor;
  }
}

template <class Isa>
int64_t attention_scratch(int64_t heads, int64_t head_dim) {
  constexpr int64_t L = Isa::kLanes, W = 2 * L;
  const int64_t width = (head_dim + L - 1) / L * L;
  const int64_t lanes = 2 * head_dim * W + kKeyBlock * W + kKeyBlock * head_dim;
  const int64_t row = heads * (2 * width + kRowKeys + kRowBlocks + 2);
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
