// Every target of this build against plain loops, for builds that Python can't load: sanitizers, other architectures.
// tests/test_kernels.py tests the same kernels further; this list is short. Prints one line a target, exits with 1 on a
// fault. `kernel_tests NAME…` fails unless these targets could run.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu.h"
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

void test_target(const Kernels& kernels) {
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
    for (const int64_t k : {1, 15, 64, 577}) test_rows(kernels, workspace, 5, k);
    test_rows(kernels, workspace, 200, 576);
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
      test_target(*target.kernels);
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
