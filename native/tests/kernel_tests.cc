// Every target of this build against plain loops, for builds that Python can't load: sanitizers, other architectures.
// tests/test_*kernels.py test the same kernels further; this list is short. Prints one line a target, exits with 1 on a
// fault. `kernel_tests NAME…` fails unless these targets could run.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu.h"
#include "decoder.h"
#include "operators.h"

using namespace fptq;

namespace {

constexpr double kEps = 1.0 / (1 << 24);

struct Fault {
  std::string what;
};

void require(bool holds, const std::string& what) {
  if (!holds) throw Fault{what};
}

std::mt19937 random_bits(1);
double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random_bits); }
int whole(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }

float bfloat16(double x) {
  const float rounded = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &rounded, 4);
  bits &= 0xFFFF0000u;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Arrays that start `shift` elements after an allocation, so that ASan sees every step outside.
template <class T>
struct Shifted {
  Shifted(int64_t count, int64_t shift) : all(count + shift), data(all.data() + shift) {}
  std::vector<T> all;
  T* data;
};

void test_multiply(const Kernels& kernels, Workspace& workspace, int64_t m, int64_t n, int64_t k, int64_t size,
                   WeightType type, bool extreme) {
  const Shape shape{n, k, size, type};
  const int top = type == WeightType::int4 ? 8 : 128;
  const int64_t groups = shape.groups();
  std::vector<int8_t> codes(n * k);
  Shifted<int8_t> a(m * k, 1);
  for (auto& q : codes) q = static_cast<int8_t>(extreme ? (whole(0, 1) ? top - 1 : -top) : whole(-top, top - 1));
  for (int64_t i = 0; i < m * k; ++i)
    a.data[i] = static_cast<int8_t>(extreme ? (whole(0, 1) ? 127 : -128) : whole(-128, 127));
  for (int64_t i = 0; i < size; ++i) codes[i] = 0;
  std::vector<float> scales(n * groups), a_scales(m), bias(n);
  for (auto& s : scales) s = bfloat16(std::exp(uniform(-6, 2)));
  for (auto& s : a_scales) s = static_cast<float>(uniform(0.01, 1));
  for (auto& b : bias) b = static_cast<float>(uniform(-1, 1));
  Shifted<uint8_t> packed(shape.bytes(), 3);
  pack(shape, codes.data(), scales.data(), packed.data, workspace.pool);
  Shifted<float> y(m * n, 1);
  multiply(kernels, shape, packed.data, m, a.data, a_scales.data(), bias.data(), y.data, workspace);
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t c = 0; c < n; ++c) {
      double wanted = 0, terms = 0;
      for (int64_t g = 0; g < groups; ++g) {
        int64_t sum = 0;
        for (int64_t i = 0; i < size; ++i) sum += a.data[r * k + g * size + i] * codes[c * k + g * size + i];
        wanted += static_cast<double>(sum) * scales[c * groups + g];
        terms += std::fabs(static_cast<double>(sum) * scales[c * groups + g]);
      }
      wanted = wanted * a_scales[r] + bias[c];
      const double bound = static_cast<double>(groups + 4) * kEps * (terms * a_scales[r] + std::fabs(bias[c]));
      require(std::fabs(wanted - y.data[r * n + c]) <= bound,
              "multiply m=" + std::to_string(m) + " n=" + std::to_string(n) + " k=" + std::to_string(k) +
                  " group=" + std::to_string(size) + " bits=" + std::to_string(static_cast<int>(type)));
    }
  }
}

std::string sizes(int64_t m, int64_t n, int64_t k) {
  return " m=" + std::to_string(m) + " n=" + std::to_string(n) + " k=" + std::to_string(k);
}

// Rows of y stand 5 floats apart, which no product may write to.
void test_floats(const Kernels& kernels, Workspace& workspace, int64_t m, int64_t n, int64_t k, WeightType type) {
  const Shape shape{n, k, k, type};
  std::vector<float> weights(n * k), bias(n);
  for (auto& w : weights) w = bfloat16(uniform(-2, 2));
  for (auto& b : bias) b = static_cast<float>(uniform(-1, 1));
  Shifted<float> x(m * k, 1), y(m * (n + 5), 1);
  for (int64_t i = 0; i < m * k; ++i) x.data[i] = static_cast<float>(uniform(-5, 5));
  std::vector<uint8_t> stored;
  for (const float w : weights) {
    uint8_t bytes[4];
    std::memcpy(bytes, &w, 4);
    stored.insert(stored.end(), bytes + (type == WeightType::bfloat16 ? 2 : 0), bytes + 4);
  }
  Shifted<uint8_t> packed(shape.bytes(), 3);
  pack_floats(shape, stored.data(), packed.data, workspace.pool);
  for (const bool with_bias : {false, true}) {
    std::fill_n(y.data, m * (n + 5), 1234.0f);
    multiply_floats(kernels, shape, packed.data, m, x.data, with_bias ? bias.data() : nullptr, y.data, n + 5,
                    workspace);
    for (int64_t r = 0; r < m; ++r) {
      for (int64_t c = 0; c < n; ++c) {
        double wanted = with_bias ? bias[c] : 0.0, terms = std::fabs(wanted);
        for (int64_t i = 0; i < k; ++i) {
          wanted += static_cast<double>(x.data[r * k + i]) * weights[c * k + i];
          terms += std::fabs(static_cast<double>(x.data[r * k + i]) * weights[c * k + i]);
        }
        const double error = std::fabs(wanted - y.data[r * (n + 5) + c]);
        require(error <= static_cast<double>(k + 1) * kEps * terms, "multiply_floats" + sizes(m, n, k));
      }
      for (int64_t c = n; c < n + 5; ++c)
        require(y.data[r * (n + 5) + c] == 1234.0f, "multiply_floats wrote beside its columns" + sizes(m, n, k));
    }
  }
}

void test_pack_words(Workspace& workspace, int64_t n, int64_t k, int64_t size) {
  const Shape shape{n, k, size, WeightType::int4};
  std::vector<int8_t> codes(n * k);
  Shifted<uint32_t> words(n * k / 8, 1);
  for (int64_t i = 0; i < n * k; ++i) {
    codes[i] = static_cast<int8_t>(whole(-8, 7));
    words.data[i / 8] |= static_cast<uint32_t>(codes[i] + 8) << 4 * (i % 8);
  }
  std::vector<float> scales(n * shape.groups());
  Shifted<uint16_t> narrow(n * shape.groups(), 1);
  for (size_t i = 0; i < scales.size(); ++i) {
    scales[i] = bfloat16(uniform(0.1, 2));
    uint32_t bits;
    std::memcpy(&bits, &scales[i], 4);
    narrow.data[i] = static_cast<uint16_t>(bits >> 16);
  }
  std::vector<uint8_t> wanted(shape.bytes());
  Shifted<uint8_t> packed(shape.bytes(), 3);
  pack(shape, codes.data(), scales.data(), wanted.data(), workspace.pool);
  pack_words(shape, words.data, narrow.data, packed.data, workspace.pool);
  require(std::equal(wanted.begin(), wanted.end(), packed.data), "pack_words" + sizes(0, n, k));
}

// The bounds of tests/test_float_kernels.py, which derives them.
void test_activate(const Kernels& kernels, int64_t k) {
  std::vector<float> up(k);
  Shifted<float> x(k, 1), y(k, 1);
  for (int64_t i = 0; i < k; ++i) x.data[i] = static_cast<float>(i % 3 ? uniform(-6, 6) : uniform(-100, 100));
  for (auto& u : up) u = static_cast<float>(uniform(-2, 2));
  for (const auto activation : {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu}) {
    kernels.activate(activation, x.data, nullptr, k, y.data);
    for (int64_t i = 0; i < k; ++i) {
      const double v = x.data[i], size = std::fabs(v);
      double wanted = 0, bound = 0;
      if (activation == Activation::silu) {
        wanted = v / (1 + std::exp(-v));
        bound = 7 * kEps * std::fabs(wanted) + 2e-36;
      } else if (activation == Activation::gelu) {
        wanted = 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
        bound = 13 * kEps * size;
      } else if (activation == Activation::gelu_tanh) {
        wanted = 0.5 * v * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (v + 0.044715 * v * v * v)));
        bound = 7 * kEps * size;
      } else {
        wanted = std::max(v, 0.0);
      }
      require(std::fabs(wanted - y.data[i]) <= bound, "activation of " + std::to_string(v));
    }
    std::vector<float> in_place(x.data, x.data + k);
    kernels.activate(activation, in_place.data(), up.data(), k, in_place.data());
    for (int64_t i = 0; i < k; ++i) require(in_place[i] == y.data[i] * up[i], "gated activation");
  }
}

// The same numbers as quantizing and multiplying one after the other, and NaN where a row has one.
void test_linear(const Kernels& kernels, Workspace& workspace, int64_t m, std::optional<float> scale) {
  const Shape shape{40, 96, 32, WeightType::int4};
  std::vector<int8_t> codes(shape.n * shape.k), quantized(m * shape.k);
  for (auto& q : codes) q = static_cast<int8_t>(whole(-8, 7));
  std::vector<float> scales(shape.n * shape.groups(), 0.5f), rows(m), y(m * shape.n), wanted(m * shape.n);
  std::vector<uint8_t> packed(shape.bytes());
  pack(shape, codes.data(), scales.data(), packed.data(), workspace.pool);
  Shifted<float> x(m * shape.k, 1);
  for (int64_t i = 0; i < m * shape.k; ++i) x.data[i] = static_cast<float>(uniform(-5, 5));
  x.data[m * shape.k - 1] = std::nanf("");
  linear(kernels, shape, packed.data(), m, x.data, scale, nullptr, y.data(), workspace);
  quantize(kernels, x.data, m, shape.k, scale, quantized.data(), rows.data(), workspace);
  multiply(kernels, shape, packed.data(), m, quantized.data(), rows.data(), nullptr, wanted.data(), workspace);
  for (int64_t i = 0; i < m * shape.n; ++i)
    require(i / shape.n == m - 1 ? std::isnan(y[i]) : y[i] == wanted[i], "linear of " + std::to_string(m) + " rows");
}

void test_rows(const Kernels& kernels, Workspace& workspace, int64_t m, int64_t k) {
  Shifted<float> x(m * k, 1), y(m * k, 1);
  for (int64_t i = 0; i < m * k; ++i) x.data[i] = static_cast<float>(uniform(-5, 5));
  std::vector<float> weight(k), bias(k), scales(m), fused_scales(m);
  for (auto& w : weight) w = static_cast<float>(uniform(-2, 2));
  for (auto& b : bias) b = static_cast<float>(uniform(-1, 1));
  Shifted<int8_t> codes(m * k, 1), fused(m * k, 1);
  for (const std::optional<float> scale : {std::optional(0.05f), std::optional<float>()}) {
    quantize(kernels, x.data, m, k, scale, codes.data, scales.data(), workspace);
    for (int64_t r = 0; r < m; ++r) {
      float step = 0;
      for (int64_t i = 0; i < k; ++i) step = std::fmax(step, std::fabs(x.data[r * k + i]));
      step = scale ? *scale : step / 127;
      require(scales[r] == step, "scale of a row");
      for (int64_t i = 0; i < k; ++i) {
        const float code = std::fmin(127.0f, std::fmax(-128.0f, std::nearbyint(x.data[r * k + i] / step)));
        require(codes.data[r * k + i] == static_cast<int8_t>(code), "code of a row");
      }
    }
    for (const bool center : {false, true}) {
      const Norm norm{weight.data(), center ? bias.data() : nullptr, 1e-5f, center};
      normalize(kernels, x.data, m, k, norm, y.data, workspace);
      for (int64_t r = 0; r < m; ++r) {
        double mean = 0, squares = 0;
        for (int64_t i = 0; i < k; ++i) mean += center ? x.data[r * k + i] / static_cast<double>(k) : 0.0;
        for (int64_t i = 0; i < k; ++i) squares += std::pow(x.data[r * k + i] - mean, 2) / static_cast<double>(k);
        for (int64_t i = 0; i < k; ++i) {
          const double gain = weight[i] / std::sqrt(squares + 1e-5);
          const double wanted = (x.data[r * k + i] - mean) * gain + (center ? bias[i] : 0.0f);
          const double bound = static_cast<double>(k + 8) * kEps * (15 * std::fabs(gain) + 1);
          require(std::fabs(wanted - y.data[r * k + i]) <= bound, "norm of " + std::to_string(k));
        }
      }
      quantize(kernels, y.data, m, k, scale, codes.data, scales.data(), workspace);
      normalize_quantize(kernels, x.data, m, k, norm, scale, fused.data, fused_scales.data(), workspace);
      require(scales == fused_scales && std::memcmp(codes.data, fused.data, m * k) == 0, "norm and quantization fused");
    }
  }
}

void test_round_in_turn(const Kernels& kernels, Workspace& workspace, int64_t columns, int64_t rows, int bits) {
  const double lowest = -(1 << (bits - 1)), highest = -lowest - 1;
  Shifted<float> values(columns * rows, 1), steps(columns * rows, 1), factor(columns * columns, 1),
      errors(columns * rows, 1);
  Shifted<int8_t> codes(columns * rows, 1);
  for (int64_t i = 0; i < columns * rows; ++i) {
    values.data[i] = static_cast<float>(uniform(-2, 2));
    steps.data[i] = static_cast<float>(uniform(0.5, 2) / highest);
  }
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = 0; j < columns; ++j)
      factor.data[i * columns + j] = static_cast<float>(i == j ? uniform(0.5, 2) : j < i ? uniform(-0.2, 0.2) : NAN);
  round_in_turn(kernels, columns, rows, values.data, steps.data, factor.data, bits, codes.data, errors.data, workspace);
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = i * rows + r;
      double value = values.data[at], size = std::fabs(value);
      for (int64_t j = 0; j < i; ++j) {
        const double term = static_cast<double>(factor.data[i * columns + j]) * errors.data[j * rows + r];
        value -= term;
        size += std::fabs(term);
      }
      const double step = steps.data[at], rounded = codes.data[at] * step;
      const double bound = static_cast<double>(columns + 4) * kEps * (size + std::fabs(rounded));
      const double exact = std::fmin(highest, std::fmax(lowest, value / step));
      require(std::fabs(exact - codes.data[at]) <= 0.5 + bound / step, "code of a column in turn");
      const double error = static_cast<double>(factor.data[i * columns + i]) * errors.data[at];
      require(std::fabs(error - (value - rounded)) <= bound, "error of a column in turn");
    }
}

void test_attention(const Kernels& kernels, Workspace& workspace, int64_t m, int64_t before, int64_t heads,
                    int64_t kv_heads, int64_t d, int64_t page_tokens, int64_t window, float softcap, bool alibi) {
  const int64_t positions = before + m, pages = (positions + page_tokens - 1) / page_tokens;
  std::vector<std::vector<int8_t>> caches(2 * pages, std::vector<int8_t>(page_tokens * kv_heads * d));
  std::vector<const int8_t*> keys, values;
  for (auto& cache : caches) {
    for (auto& code : cache) code = static_cast<int8_t>(whole(-128, 127));
    (keys.size() < static_cast<size_t>(pages) ? keys : values).push_back(cache.data());
  }
  Shifted<float> queries(m * heads * d, 1), out(m * heads * d, 1);
  for (int64_t i = 0; i < m * heads * d; ++i) queries.data[i] = static_cast<float>(uniform(-1, 1));
  std::vector<float> slopes(heads);
  for (auto& slope : slopes) slope = static_cast<float>(uniform(0, 0.5));
  const Attention attention{.queries = queries.data,
                            .outputs = out.data,
                            .query_stride = heads * d,
                            .output_stride = heads * d,
                            .m = m,
                            .heads = heads,
                            .kv_heads = kv_heads,
                            .head_dim = d,
                            .key_pages = keys.data(),
                            .value_pages = values.data(),
                            .page_tokens = page_tokens,
                            .key_scale = 0.02f,
                            .value_scale = 0.05f,
                            .softmax_scale = 0.2f,
                            .softcap = softcap,
                            .first_position = before,
                            .window = window,
                            .alibi_slopes = alibi ? slopes.data() : nullptr};
  attend(kernels, attention, workspace);
  // To the bit the same, however rows and heads are divided.
  std::vector<float> alone(heads * d);
  for (const int64_t r : {int64_t{0}, m / 2, m - 1}) {
    Attention one = attention;
    one.queries += r * heads * d;
    one.outputs = alone.data();
    one.first_position += r;
    one.m = 1;
    for (const bool by_head : {false, true}) {
      std::fill(alone.begin(), alone.end(), 0.0f);
      if (by_head) {
        for (int64_t h = 0; h < heads; ++h)
          attend_part(kernels, one, {h / (heads / kv_heads), h % (heads / kv_heads), 1, 0, 1}, workspace.scratch[0]);
      } else {
        attend(kernels, one, workspace);
      }
      require(std::equal(alone.begin(), alone.end(), out.data + r * heads * d),
              "attention of one row isn't that of many, m=" + std::to_string(m) + " d=" + std::to_string(d));
    }
  }
  const auto key = [&](int64_t position, int64_t head, int64_t i) {
    return keys[position / page_tokens][(head * d + i) * page_tokens + position % page_tokens];
  };
  const auto value = [&](int64_t position, int64_t head, int64_t i) {
    return values[position / page_tokens][(head * page_tokens + position % page_tokens) * d + i];
  };
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = before + r, first = window && at >= window ? at - window + 1 : 0, kv = h / (heads / kv_heads);
      std::vector<double> weights, result(d);
      double total = 0;
      for (int64_t t = first; t <= at; ++t) {
        double score = 0;
        for (int64_t i = 0; i < d; ++i) score += queries.data[(r * heads + h) * d + i] * key(t, kv, i);
        score *= 0.02 * 0.2;
        if (softcap > 0) score = softcap * std::tanh(score / softcap);
        if (alibi) score += slopes[h] * static_cast<double>(t - at);
        weights.push_back(std::exp(score));
        total += weights.back();
      }
      for (int64_t t = first; t <= at; ++t)
        for (int64_t i = 0; i < d; ++i) result[i] += weights[t - first] / total * value(t, kv, i) * 0.05;
      for (int64_t i = 0; i < d; ++i)
        require(std::fabs(result[i] - out.data[(r * heads + h) * d + i]) < 1e-4, "attention m=" + std::to_string(m));
    }
  }
}

// A random decoder, and a cache for three sequences.
struct Decoder {
  // With `plain`: RMSNorm, grouped heads with norms, rotation, a window, a gated MLP, all types of weights, separate
  // and fused. Otherwise: LayerNorm, ALiBi, caps, learned positions, norms after the residual branches, an int8
  // embedding.
  explicit Decoder(bool plain, Pool& pool) : pool_(pool) {
    model.hidden = 40;
    model.heads = plain ? 6 : 3;
    model.kv_heads = plain ? 2 : 3;
    model.head_dim = plain ? 20 : 9;
    model.inner = 72;
    model.activation = plain ? Activation::silu : Activation::gelu_tanh;
    model.softmax_scale = 0.3f;
    model.attention_softcap = plain ? 0.0f : 5.0f;
    model.logit_softcap = plain ? 0.0f : 3.0f;
    model.alibi_slopes = plain ? nullptr : random(model.heads, 0, 0.5);
    model.residual_from_norm = !plain;
    const int64_t queries = model.heads * model.head_dim, keys = model.kv_heads * model.head_dim;
    for (int b = 0; b < 2; ++b) {
      Block block;
      block.attention_norm = norm(model.hidden, !plain);
      block.mlp_norm = norm(model.hidden, !plain);
      if (plain) {
        block.query_norm = norm(model.head_dim, false);
        block.key_norm = norm(model.head_dim, false);
        block.rotation = {random(kPositions * 8, -1, 1), random(kPositions * 8, -1, 1), 16};
        block.window = b ? 9 : 0;
        block.key_column = 128;
        block.value_column = 192;
        block.up_column = 96;
        block.qkv = {
            {matrix(64, 40, 8, WeightType::int4, 0.03f), matrix(56, 40, 8, WeightType::int4, 0.05f, 64),
             matrix(keys, 40, 20, WeightType::int4, 0.05f, 128), matrix(keys, 40, 40, WeightType::int8, {}, 192)},
            192 + keys};
        block.up = {{matrix(72, 40, 40, WeightType::float32, {}), matrix(72, 40, 40, WeightType::int8, {}, 96)}, 168};
        block.down = {{matrix(40, 72, 24, WeightType::int4, {})}, 40};
      } else {
        block.attention_output_norm = norm(model.hidden, true);
        block.mlp_output_norm = norm(model.hidden, false);
        block.key_column = queries;
        block.value_column = queries + keys;
        block.qkv = {{matrix(queries + 2 * keys, 40, 20, WeightType::int4, {})}, queries + 2 * keys};
        block.up = {{matrix(72, 40, 40, WeightType::bfloat16, {})}, 72};
        block.down = {{matrix(40, 72, 72, WeightType::int8, 0.02f)}, 40};
      }
      block.attention_output = {{matrix(40, queries, queries, plain ? WeightType::int8 : WeightType::float32, {})}, 40};
      block.key_scale = 0.03f;
      block.value_scale = 0.02f;
      model.blocks.push_back(block);
    }
    model.final_norm = norm(model.hidden, !plain);
    const Matrix head = matrix(kVocabulary, 40, 40, plain ? WeightType::bfloat16 : WeightType::int8, {});
    model.head = {{head}, kVocabulary};
    if (plain) {
      model.embedding.shape = {kVocabulary, 40, 40, WeightType::float32};
      model.embedding.data = reinterpret_cast<const uint8_t*>(random(kVocabulary * 40, -1, 1));
    } else {
      model.embedding.shape = head.shape;
      model.embedding.data = head.packed;
      model.embedding.positions = random(kPositions * 40, -1, 1);
      model.embedding.norm = norm(40, true);
    }
    model.embedding.scale = 1.5f;
    for (int64_t page = 0; page < 3 * kPages; ++page) pages.push_back(page);
    std::shuffle(pages.begin(), pages.end(), random_bits);
    for (int64_t s = 0; s < 3; ++s)
      for (int64_t i = 0; i < kLengths[s]; ++i) tokens[s].push_back(whole(0, kVocabulary - 1));
  }

  static constexpr int kVocabulary = 70;
  static constexpr int64_t kLengths[3] = {1, 33, 21};
  static constexpr int64_t kPageTokens = 8, kPages = 5, kPositions = 33;  // pages of a sequence

  Model model;
  std::vector<int64_t> pages;
  std::vector<int32_t> tokens[3];

  std::vector<float>& keep(std::vector<float> values) {
    floats_.push_back(std::move(values));
    return floats_.back();
  }

 private:
  const float* random(int64_t count, double low, double high) {
    std::vector<float> values(count);
    for (auto& x : values) x = static_cast<float>(uniform(low, high));
    return keep(values).data();
  }

  Norm norm(int64_t k, bool center) {
    return {random(k, 0.5, 1.5), center ? random(k, -0.5, 0.5) : nullptr, 1e-5f, center};
  }

  // Outputs about as large as inputs.
  Matrix matrix(int64_t n, int64_t k, int64_t size, WeightType type, std::optional<float> input_scale,
                int64_t column = 0) {
    const Shape shape{n, k, size, type};
    bytes_.emplace_back(shape.bytes());
    const double spread = std::sqrt(3.0 / static_cast<double>(k));
    if (shape.is_float()) {
      std::vector<uint8_t> stored;
      for (int64_t i = 0; i < n * k; ++i) {
        const float w = bfloat16(uniform(-spread, spread));
        uint8_t four[4];
        std::memcpy(four, &w, 4);
        stored.insert(stored.end(), four + (type == WeightType::bfloat16 ? 2 : 0), four + 4);
      }
      pack_floats(shape, stored.data(), bytes_.back().data(), pool_);
    } else {
      const int top = shape.offset();
      std::vector<int8_t> codes(n * k);
      std::vector<float> scales(n * shape.groups());
      for (auto& q : codes) q = static_cast<int8_t>(whole(-top, top - 1));
      for (auto& s : scales) s = bfloat16(spread / top * uniform(0.5, 1.5));
      pack(shape, codes.data(), scales.data(), bytes_.back().data(), pool_);
    }
    return {shape, bytes_.back().data(), column ? nullptr : random(n, -0.2, 0.2), input_scale, column};
  }

  Pool& pool_;
  std::deque<std::vector<float>> floats_;
  std::deque<std::vector<uint8_t>> bytes_;
};

// Tokens first..last - 1 of a sequence.
struct Share {
  int sequence;
  int64_t first, last;
};

// The logits of the rows for which wanted(sequence, position) holds, after steps that start with an empty cache.
using Logits = std::map<std::pair<int, int64_t>, std::vector<float>>;
Logits run_steps(const Kernels& kernels, const Decoder& decoder, Workspace& workspace,
                 const std::vector<std::vector<Share>>& steps, const std::function<bool(int, int64_t)>& wanted) {
  const Model& model = decoder.model;
  const int64_t size = 2 * 3 * Decoder::kPages * Decoder::kPageTokens * model.kv_heads * model.head_dim;
  std::vector<int8_t> keys(size, 99), values(size, 99);
  const Cache cache{keys.data(), values.data(), 3 * Decoder::kPages, Decoder::kPageTokens};
  State state;
  Logits all;
  for (const auto& step : steps) {
    std::vector<int32_t> tokens;
    std::vector<Run> runs;
    std::vector<int64_t> rows;
    std::vector<std::pair<int, int64_t>> places;
    for (const auto& [sequence, first, last] : step) {
      runs.push_back({last - first, first, decoder.pages.data() + sequence * Decoder::kPages});
      for (int64_t i = first; i < last; ++i) {
        if (wanted(sequence, i)) {
          rows.push_back(static_cast<int64_t>(tokens.size()));
          places.emplace_back(sequence, i);
        }
        tokens.push_back(decoder.tokens[sequence][i]);
      }
    }
    Shifted<float> logits(static_cast<int64_t>(rows.size()) * Decoder::kVocabulary + 1, 1);
    const int64_t failed = forward(kernels, model, cache, tokens.data(), runs, rows.data(),
                                   static_cast<int64_t>(rows.size()), logits.data, state, workspace);
    require(failed == -1, "a step failed before block " + std::to_string(failed));
    for (size_t i = 0; i < places.size(); ++i)
      all[places[i]].assign(logits.data + i * Decoder::kVocabulary, logits.data + (i + 1) * Decoder::kVocabulary);
  }
  return all;
}

// Texts together, each by itself, in pieces, token by token, on several threads: all the same to the bit.
void test_decoder(const Kernels& kernels, const Kernels& scalar, bool plain) {
  Workspace one(1), three(3);
  Decoder decoder(plain, one.pool);
  const auto everything = [](int, int64_t) { return true; };
  const std::vector<Share> whole_texts = {{0, 0, 1}, {1, 0, 33}, {2, 0, 21}};
  const Logits wanted = run_steps(kernels, decoder, one, {whole_texts}, everything);
  require(wanted.size() == 55, "logits are missing");
  std::vector<float> flat;
  for (const auto& [place, row] : wanted) flat.insert(flat.end(), row.begin(), row.end());
  for (const float x : flat) require(std::isfinite(x) && std::fabs(x) < 100, "logits are out of range");
  require(wanted.at({1, 32}) != wanted.at({1, 31}) && wanted.at({0, 0}) != wanted.at({2, 0}),
          "logits are all the same");

  std::vector<std::vector<Share>> alone, pieces, tokens, mixed = {{{1, 0, 20}, {2, 0, 20}}};
  for (const auto& text : whole_texts) alone.push_back({text});
  for (int64_t i = 0; i < 33; i += 7) pieces.push_back({{1, i, std::min<int64_t>(33, i + 7)}});
  for (int64_t i = 0; i < 33; ++i) {
    tokens.emplace_back();
    for (const auto& text : whole_texts)
      if (i < text.last) tokens.back().push_back({text.sequence, i, i + 1});
  }
  mixed.push_back({{1, 20, 33}, {0, 0, 1}, {2, 20, 21}});
  const auto last_ones = [](int sequence, int64_t i) { return i + 1 == Decoder::kLengths[sequence]; };
  const auto some = [](int sequence, int64_t i) { return sequence == 1 && (i == 3 || i == 20 || i == 32); };
  const auto late = [](int, int64_t i) { return i >= 20; };
  const struct {
    const char* name;
    std::vector<std::vector<Share>> steps;
    std::function<bool(int, int64_t)> wanted;
  } cases[] = {
      {"alone", alone, everything}, {"in pieces", pieces, everything},   {"token by token", tokens, everything},
      {"mixed", mixed, everything}, {"whole", {whole_texts}, last_ones}, {"whole", {whole_texts}, some},
      {"in pieces", pieces, late},  {"token by token", tokens, late},    {"token by token", tokens, some}};
  for (Workspace* workspace : {&one, &three}) {
    for (const auto& [name, steps, choose] : cases) {
      const Logits got = run_steps(kernels, decoder, *workspace, steps, choose);
      require(!got.empty(), "no logits");
      for (const auto& [place, row] : got)
        require(row == wanted.at(place), "a decoder " + std::string(name) + " on " +
                                             std::to_string(workspace->pool.threads()) + " threads, sequence " +
                                             std::to_string(place.first) + " token " + std::to_string(place.second));
    }
  }

  // Layers that read one input, in another order.
  Decoder turned = decoder;
  for (auto& block : turned.model.blocks)
    for (Projection* const projection : {&block.qkv, &block.up})
      std::reverse(projection->parts.begin(), projection->parts.end());
  const bool same = run_steps(kernels, turned, one, {whole_texts}, everything) == wanted;
  require(same, "layers in another order");

  // Another target rounds sums differently, which now and then makes another code of the next layer's input: one step.
  const Logits others = run_steps(scalar, decoder, one, {whole_texts}, everything);
  std::vector<double> differences;
  double largest = 0;
  for (const auto& [place, row] : others)
    for (int i = 0; i < Decoder::kVocabulary; ++i) {
      differences.push_back(std::fabs(row[i] - wanted.at(place)[i]));
      largest = std::max<double>(largest, std::fabs(row[i]));
    }
  std::sort(differences.begin(), differences.end());
  require(differences[differences.size() / 2] <= 1e-5 * largest && differences.back() <= 0.05 * largest,
          "a decoder on the scalar target");

  if (decoder.model.embedding.shape.is_float()) {  // rows from a file
    std::FILE* const file = std::tmpfile();
    require(file != nullptr, "no temporary file");
    const Embedding& embedding = decoder.model.embedding;
    std::fputs("before", file);
    std::fwrite(embedding.data, 4, Decoder::kVocabulary * 40, file);
    std::fflush(file);
    decoder.model.embedding.data = nullptr;
    decoder.model.embedding.file = fileno(file);
    decoder.model.embedding.offset = 6;
    const Logits got = run_steps(kernels, decoder, three, {whole_texts}, last_ones);
    for (const auto& [place, row] : got) require(row == wanted.at(place), "an embedding in a file");
    std::fclose(file);
  }
}

// What isn't finite is found by the block whose input it is.
void test_decoder_faults(const Kernels& kernels) {
  Workspace workspace(2);
  for (const int64_t block : {0, 1, 2}) {
    Decoder decoder(false, workspace.pool);
    const Norm& norm = block == 2 ? decoder.model.final_norm : decoder.model.blocks[block].attention_norm;
    std::vector<float>& weight = decoder.keep({norm.weight, norm.weight + 40});
    weight[39] = kNan;
    (block == 2 ? decoder.model.final_norm : decoder.model.blocks[block].attention_norm).weight = weight.data();
    try {
      run_steps(kernels, decoder, workspace, {{{2, 0, 21}}}, [](int, int64_t i) { return i > 4; });
      require(false, "a NaN was lost");
    } catch (const Fault& fault) {
      require(fault.what == "a step failed before block " + std::to_string(block), fault.what);
    }
  }
}

void test_target(const Kernels& kernels, const Kernels& scalar) {
  for (const bool plain : {true, false}) test_decoder(kernels, scalar, plain);
  test_decoder_faults(kernels);
  for (const int threads : {1, 3}) {
    Workspace workspace(threads);
    for (const auto type : {WeightType::int4, WeightType::int8})
      for (const int64_t m : {1, 2, 5, 9, 17, 80})
        for (const bool extreme : {false, true}) {
          test_multiply(kernels, workspace, m, 37, 96, 32, type, extreme);
          test_multiply(kernels, workspace, m, 64, 30, 6, type, extreme);
          test_multiply(kernels, workspace, m, 33, 256, 256, type, extreme);
        }
    test_multiply(kernels, workspace, 70, 40, 8192, 128, WeightType::int4, false);
    for (const auto type : {WeightType::bfloat16, WeightType::float32})
      for (const int64_t m : {1, 2, 7, 17}) {
        test_floats(kernels, workspace, m, 1, 1, type);
        test_floats(kernels, workspace, m, 37, 30, type);
        test_floats(kernels, workspace, m, 64, 65, type);
      }
    test_pack_words(workspace, 1, 8, 8);
    test_pack_words(workspace, 70, 96, 32);
    test_pack_words(workspace, 64, 64, 8);
    for (const int64_t k : {1, 15, 64, 577}) test_activate(kernels, k);
    for (const int64_t k : {1, 15, 64, 577}) test_rows(kernels, workspace, 5, k);
    test_rows(kernels, workspace, 200, 576);
    for (const int64_t columns : {1, 2, 128})
      for (const int64_t rows : {1, 32, 77}) {
        test_round_in_turn(kernels, workspace, columns, rows, 4);
        test_round_in_turn(kernels, workspace, columns, rows, 8);
      }
    for (const int64_t m : {1, 8, 30, 600})
      for (const auto scale : {std::optional(0.05f), std::optional<float>()}) test_linear(kernels, workspace, m, scale);
    for (const int64_t d : {7, 20, 33, 64})
      for (const int64_t m : {1, 40})
        for (const int64_t page_tokens : {1, 24, 300}) {
          test_attention(kernels, workspace, m, 0, 6, 2, d, page_tokens, 0, 0, false);
          test_attention(kernels, workspace, m, 70, 17, 1, d, page_tokens, 30, 5, true);
        }
    // A task that throws: the exception arrives here, and the pool goes on.
    for (int i = 0; i < 20; ++i) {
      try {
        workspace.pool.run(50, [&](int64_t task, int) {
          if (task == i) throw Fault{"thrown"};
        });
        require(false, "an exception of a task was lost");
      } catch (const Fault& fault) {
        require(fault.what == "thrown", fault.what);
      }
      std::atomic<int> done = 0;
      workspace.pool.run(50, [&](int64_t, int) { ++done; });
      require(done == 50, "a task was lost");
    }
    // Several callers of one pool.
    std::vector<std::thread> callers;
    std::vector<float> weight(64, 1.0f), x(64 * 100, 0.5f);
    for (int caller = 0; caller < 3; ++caller)
      callers.emplace_back([&] {
        std::vector<int8_t> codes(x.size());
        std::vector<float> scales(100);
        for (int i = 0; i < 20; ++i) {
          const auto lock = workspace.pool.lock();
          quantize(kernels, x.data(), 100, 64, 0.25f, codes.data(), scales.data(), workspace);
        }
      });
    for (auto& caller : callers) caller.join();
  }
}

}  // namespace

int main(int count, char** names) {
  std::vector<std::string> ran;
  for (const auto& target : targets()) {
    if (!target.kernels) {
      std::printf("%s: this CPU has no %s\n", target.name, target.missing.c_str());
      continue;
    }
    try {
      test_target(*target.kernels, *targets().back().kernels);
    } catch (const Fault& fault) {
      std::printf("%s: WRONG: %s\n", target.name, fault.what.c_str());
      return 1;
    }
    std::printf("%s: right\n", target.name);
    ran.push_back(target.name);
  }
  for (int i = 1; i < count; ++i) {
    bool found = false;
    for (const auto& name : ran) found = found || name == names[i];
    if (!found) {
      std::printf("%s didn't run\n", names[i]);
      return 1;
    }
  }
  return 0;
}
