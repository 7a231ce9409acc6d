// Products, norms, activations, attention, and rounding of weights against plain loops; and the pool that runs them.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "operators.h"
#include "support.h"

namespace fptq::tests {
namespace {

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

}  // namespace

void test_operators(const Kernels& kernels) {
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

}  // namespace fptq::tests
