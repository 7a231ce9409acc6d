// Whole steps of random decoders: however texts are cut and put together, the same to the bit.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "decoder.h"
#include "support.h"

namespace fptq::tests {
namespace {

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

}  // namespace

void test_decoders(const Kernels& kernels, const Kernels& scalar) {
  for (const bool plain : {true, false}) test_decoder(kernels, scalar, plain);
  test_decoder_faults(kernels);
}

}  // namespace fptq::tests
