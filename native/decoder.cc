#include "decoder.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

#if defined(_WIN32)
#include <io.h>
#include <windows.h>
#else
#include <unistd.h>
#endif

namespace fptq {
namespace {

// Where a projection's input rows come from, and what happens to them first: a norm, or an MLP's activation.
struct Input {
  const float* data;
  int64_t stride;
  const Norm* norm = nullptr;
  const Activation* activation = nullptr;
  int64_t up_column = 0;  // with an activation: of the factor, 0 for none
};

constexpr int64_t kLine = 64;

float bfloat16_at(const uint8_t* p) {
  uint16_t upper;
  std::memcpy(&upper, p, 2);
  const uint32_t bits = static_cast<uint32_t>(upper) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Reads up to `bytes` bytes from `offset` on, wherever the file stands, and returns how many; 0 at its end, -1 on
// failure.
int64_t read_some(int file, int64_t offset, int64_t bytes, uint8_t* to) {
#if defined(_WIN32)
  OVERLAPPED place{};
  place.Offset = static_cast<DWORD>(offset);
  place.OffsetHigh = static_cast<DWORD>(offset >> 32);
  const auto handle = reinterpret_cast<HANDLE>(_get_osfhandle(file));
  const auto most = static_cast<DWORD>(std::min<int64_t>(bytes, 1 << 30));
  DWORD got = 0;
  return ReadFile(handle, to, most, &got, &place) ? int64_t{got} : -1;
#else
  ssize_t got = 0;
  do {
    got = pread(file, to, static_cast<size_t>(bytes), static_cast<off_t>(offset));
  } while (got < 0 && errno == EINTR);
  return got;
#endif
}

void read_file(int file, int64_t offset, int64_t bytes, uint8_t* to) {
  while (bytes > 0) {
    const int64_t got = read_some(file, offset, bytes, to);
    if (got <= 0) throw std::runtime_error("the checkpoint's file can't be read any more");
    offset += got;
    bytes -= got;
    to += got;
  }
}

void rotate(float* x, const Rotation& rotation, int64_t position) {
  const int64_t half = rotation.dims / 2;
  const float* const cosines = rotation.cosines + position * half;
  const float* const sines = rotation.sines + position * half;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cosines[i] - second * sines[i];
    x[i + half] = second * cosines[i] + first * sines[i];
  }
}

class Step {
 public:
  Step(const Kernels& kernels, const Model& model, const Cache& cache, State& state, Workspace& workspace)
      : kernels_(kernels), model_(model), cache_(cache), state_(state), workspace_(workspace) {}

  int64_t run(const int32_t* tokens, const std::vector<Run>& runs, const int64_t* wanted, int64_t wanted_count,
              float* logits) {
    runs_ = runs;
    place_rows();
    x_ = state_.hidden.reserve_array<float>(rows_ * model_.hidden);
    y_ = state_.output.reserve_array<float>(rows_ * model_.hidden);
    embed(tokens);
    spent(kEmbedding);
    const auto blocks = static_cast<int64_t>(model_.blocks.size());
    for (int64_t b = 0; b < blocks && finite_; ++b) {
      const bool last = b + 1 == blocks;
      run_block(b, last ? wanted : nullptr, wanted_count);
      if (!finite_) return b;
      if (last && wanted_count == 0) return -1;
    }
    project(model_.head, {.data = x_, .stride = model_.hidden, .norm = &model_.final_norm}, logits);
    spent(kHead);
    if (!finite_) return blocks;
    if (model_.logit_softcap != 0.0f) cap(logits);
    return -1;
  }

 private:
  // Counts the time since the last call for a stage.
  void spent(Stage stage) {
    const auto now = std::chrono::steady_clock::now();
    state_.seconds[stage] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

  // Which run and position every row has.
  void place_rows() {
    state_.run_of.clear();
    state_.positions.clear();
    for (size_t r = 0; r < runs_.size(); ++r) {
      for (int64_t i = 0; i < runs_[r].rows; ++i) {
        state_.run_of.push_back(static_cast<int64_t>(r));
        state_.positions.push_back(runs_[r].first_position + i);
      }
    }
    rows_ = static_cast<int64_t>(state_.run_of.size());
  }

  void embed(const int32_t* tokens) {
    const Embedding& e = model_.embedding;
    for_rows(rows_, model_.hidden, workspace_, [&](int64_t row, int thread) {
      float* const x = x_ + row * model_.hidden;
      look_up(tokens[row], x, workspace_.scratch[thread]);
      for (int64_t i = 0; i < model_.hidden; ++i) x[i] *= e.scale;
      if (e.positions) {
        const float* const p = e.positions + state_.positions[row] * model_.hidden;
        for (int64_t i = 0; i < model_.hidden; ++i) x[i] += p[i];
      }
      if (e.norm.weight) kernels_.normalize(x, model_.hidden, e.norm, x);
    });
  }

  void look_up(int64_t token, float* x, Buffer& scratch) const {
    const Embedding& e = model_.embedding;
    const int64_t k = e.shape.k;
    if (e.shape.is_float()) {
      const int64_t bytes = k * static_cast<int>(e.shape.type) / 8;
      const uint8_t* row = nullptr;
      if (e.data) {
        row = e.data + token * bytes;
      } else {
        auto* const read = scratch.reserve_array<uint8_t>(bytes);
        read_file(e.file, e.offset + token * bytes, bytes, read);
        row = read;
      }
      if (e.shape.type == WeightType::float32) {
        std::memcpy(x, row, static_cast<size_t>(bytes));
      } else {
        for (int64_t i = 0; i < k; ++i) x[i] = bfloat16_at(row + i * 2);
      }
      return;
    }
    const int64_t channel = token % kPanelChannels, steps = e.shape.group_steps();
    const uint8_t* group = e.data + token / kPanelChannels * e.shape.panel_bytes();
    for (int64_t i = 0; i < k; i += e.shape.group_size, group += e.shape.group_bytes()) {
      const float scale = bfloat16_at(group + steps * e.shape.step_bytes() + channel * 2);
      for (int64_t j = 0; j < e.shape.group_size; ++j) {
        const uint8_t code = group[j / kStepInputs * e.shape.step_bytes() + channel * kStepInputs + j % kStepInputs];
        x[i + j] = static_cast<float>(code - e.shape.offset()) * scale;
      }
    }
  }

  // With `wanted`, only these rows go on after their keys and values are in the cache.
  void run_block(int64_t index, const int64_t* wanted, int64_t wanted_count) {
    const Block& block = model_.blocks[index];
    const int64_t hidden = model_.hidden;
    qkv_ = state_.qkv.reserve_array<float>(rows_ * block.qkv.columns);
    project(block.qkv, {.data = x_, .stride = hidden, .norm = &block.attention_norm}, qkv_);
    if (!finite_) return;
    const bool alone = !(wanted && wanted_count < rows_) &&
                       std::all_of(runs_.begin(), runs_.end(), [](const Run& run) { return run.rows == 1; });
    if (!alone) {
      for_rows(rows_, block.qkv.columns, workspace_, [&](int64_t row, int) {
        for (int64_t h = 0; h < model_.kv_heads; ++h) enter_cache(index, row, h);
      });
      spent(kCaching);
    }
    if (wanted) keep_rows(wanted, wanted_count, block.qkv.columns);
    if (rows_ == 0) return;
    attend(index, alone);
    spent(kAttention);
    const int64_t width = model_.heads * model_.head_dim;
    project(block.attention_output, {.data = attended_, .stride = width}, y_);
    add(block.attention_norm, block.attention_output_norm);
    spent(kResiduals);
    auto* const inner = state_.inner.reserve_array<float>(rows_ * block.up.columns);
    project(block.up, {.data = x_, .stride = hidden, .norm = &block.mlp_norm}, inner);
    project(block.down,
            {.data = inner, .stride = block.up.columns, .activation = &model_.activation, .up_column = block.up_column},
            y_);
    add(block.mlp_norm, block.mlp_output_norm);
    spent(kResiduals);
  }

  // The rows `wanted` (ascending) alone; each becomes a run of its own.
  void keep_rows(const int64_t* wanted, int64_t count, int64_t qkv_columns) {
    std::vector<Run> kept;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = wanted[i];
      kept.push_back({1, state_.positions[row], runs_[state_.run_of[row]].pages});
      if (row == i) continue;
      std::memcpy(x_ + i * model_.hidden, x_ + row * model_.hidden, sizeof(float) * model_.hidden);
      std::memcpy(qkv_ + i * qkv_columns, qkv_ + row * qkv_columns, sizeof(float) * qkv_columns);
    }
    if (count == rows_) return;
    runs_ = kept;
    place_rows();
  }

  int8_t* page(int8_t* cache, int64_t block, int64_t number) const {
    return cache + (block * cache_.pages + number) * cache_.page_tokens * model_.kv_heads * model_.head_dim;
  }

  // Queries, key and value of a row that belong to one key/value head: norms, rotation; key and value into the cache.
  void enter_cache(int64_t index, int64_t row, int64_t kv_head) {
    const Block& block = model_.blocks[index];
    const int64_t d = model_.head_dim, shared = model_.heads / model_.kv_heads, position = state_.positions[row];
    float* const states = qkv_ + row * block.qkv.columns;
    float* const key = states + block.key_column + kv_head * d;
    const auto place = [&](float* x, const Norm& norm) {
      if (norm.weight) kernels_.normalize(x, d, norm, x);
      if (block.rotation.cosines) rotate(x, block.rotation, position);
    };
    for (int64_t h = kv_head * shared; h < (kv_head + 1) * shared; ++h) place(states + h * d, block.query_norm);
    place(key, block.key_norm);
    const int64_t number = runs_[state_.run_of[row]].pages[position / cache_.page_tokens];
    const int64_t token = position % cache_.page_tokens, head = kv_head * cache_.page_tokens * d;
    int8_t* const keys = page(cache_.keys, index, number) + head + token;
    for (int64_t i = 0; i < d; i += kLine) {
      int8_t codes[kLine];
      const int64_t count = std::min(kLine, d - i);
      if (!kernels_.quantize(key + i, count, block.key_scale, codes)) finite_ = false;
      for (int64_t j = 0; j < count; ++j) keys[(i + j) * cache_.page_tokens] = codes[j];
    }
    const float* const value = states + block.value_column + kv_head * d;
    if (!kernels_.quantize(value, d, block.value_scale, page(cache_.values, index, number) + head + token * d))
      finite_ = false;
  }

  // Attention of all rows; with `alone` every run is one row, which the first task of a head enters into the cache.
  void attend(int64_t index, bool alone) {
    const Block& block = model_.blocks[index];
    const int64_t width = model_.heads * model_.head_dim, kv_heads = model_.kv_heads;
    attended_ = state_.attended.reserve_array<float>(rows_ * width);
    auto& attentions = state_.attentions;
    auto& pieces = state_.pieces;
    attentions.clear();
    pieces.clear();
    list_pages(index);
    const int8_t* const* pages = state_.pages.data();
    int64_t row = 0;
    for (const Run& run : runs_) {
      const int64_t count = divide_up(run.first_position + run.rows, cache_.page_tokens);
      attentions.push_back({.queries = qkv_ + row * block.qkv.columns,
                            .outputs = attended_ + row * width,
                            .query_stride = block.qkv.columns,
                            .output_stride = width,
                            .m = run.rows,
                            .heads = model_.heads,
                            .kv_heads = kv_heads,
                            .head_dim = model_.head_dim,
                            .key_pages = pages,
                            .value_pages = pages + count,
                            .page_tokens = cache_.page_tokens,
                            .key_scale = block.key_scale,
                            .value_scale = block.value_scale,
                            .softmax_scale = model_.softmax_scale,
                            .softcap = model_.attention_softcap,
                            .first_position = run.first_position,
                            .window = block.window,
                            .alibi_slopes = model_.alibi_slopes});
      pages += 2 * count;
      row += run.rows;
    }
    if (alone) return attend_single_rows(index);
    const int64_t shared = model_.heads / kv_heads;
    for (size_t r = 0; r < runs_.size(); ++r) {
      const int64_t rows = runs_[r].rows, together = rows_together(kernels_, attentions[r]);
      // Late rows see most keys: they go first, so that the threads end together.
      for (int64_t first = (divide_up(rows, together) - 1) * together; first >= 0; first -= together)
        for (int64_t h = 0; h < kv_heads; ++h)
          pieces.push_back({r, {h, 0, shared, first, std::min(together, rows - first)}});
    }
    run_pieces();
  }

  // One row of each run. If there are too few for the threads, these share the heads that share a key.
  void attend_single_rows(int64_t index) {
    const int64_t kv_heads = model_.kv_heads, shared = model_.heads / kv_heads;
    const auto tasks = static_cast<int64_t>(runs_.size()) * kv_heads;
    const int64_t heads = divide_up(shared, divide_up(workspace_.pool.threads(), tasks));
    for (size_t r = 0; r < runs_.size(); ++r)
      for (int64_t h = 0; h < kv_heads; ++h)
        for (int64_t first = 0; first < shared; first += heads)
          state_.pieces.push_back({r, {h, first, std::min(heads, shared - first), 0, 1}});
    if (heads == shared) {
      workspace_.pool.run(tasks, [&](int64_t i, int thread) {
        const Piece& piece = state_.pieces[i];
        enter_cache(index, static_cast<int64_t>(piece.run), piece.part.kv_head);
        attend_part(kernels_, state_.attentions[piece.run], piece.part, workspace_.scratch[thread]);
      });
    } else {
      for (int64_t row = 0; row < rows_; ++row)
        for (int64_t h = 0; h < kv_heads; ++h) enter_cache(index, row, h);
      run_pieces();
    }
  }

  void run_pieces() {
    workspace_.pool.run(static_cast<int64_t>(state_.pieces.size()), [&](int64_t i, int thread) {
      const Piece& piece = state_.pieces[i];
      attend_part(kernels_, state_.attentions[piece.run], piece.part, workspace_.scratch[thread]);
    });
  }

  // Addresses of every run's pages of keys, then of values.
  void list_pages(int64_t index) {
    state_.pages.clear();
    for (const Run& run : runs_)
      for (int8_t* const cache : {cache_.keys, cache_.values})
        for (int64_t p = 0; p * cache_.page_tokens < run.first_position + run.rows; ++p)
          state_.pages.push_back(page(cache, index, run.pages[p]));
  }

  // x += norm(y), or to the normed x.
  void add(const Norm& input_norm, const Norm& output_norm) {
    const int64_t hidden = model_.hidden;
    for_rows(rows_, hidden, workspace_, [&](int64_t row, int) {
      float* const x = x_ + row * hidden;
      float* const y = y_ + row * hidden;
      if (model_.residual_from_norm) kernels_.normalize(x, hidden, input_norm, x);
      if (output_norm.weight) kernels_.normalize(y, hidden, output_norm, y);
      for (int64_t i = 0; i < hidden; ++i) x[i] += y[i];
    });
  }

  // y [rows, columns] = what the projection makes of the input.
  void project(const Projection& projection, const Input& input, float* y) {
    const Matrix* before = nullptr;
    Tiles tiles{};
    for (const Matrix& part : projection.parts) {
      if (part.shape.is_float()) {
        auto* const floats = state_.floats.reserve_array<float>(rows_ * part.shape.k);
        for_rows(rows_, part.shape.k, workspace_, [&](int64_t row, int) {
          float* const out = floats + row * part.shape.k;
          const float* const from = floats_of(input, row, part.shape.k, out);
          if (from != out) std::memcpy(out, from, sizeof(float) * part.shape.k);
          if (!std::all_of(out, out + part.shape.k, [](float x) { return std::isfinite(x); })) finite_ = false;
        });
        spent(kInputs);
        multiply_floats(kernels_, part.shape, part.packed, rows_, floats, part.bias, y + part.column,
                        projection.columns, workspace_);
        if (&projection != &model_.head) spent(kProducts);
        continue;
      }
      const bool same = before && before->shape.group_size == part.shape.group_size &&
                        before->shape.type == part.shape.type && before->input_scale == part.input_scale;
      if (!same) {
        tiles = prepare(
            kernels_, part.shape, rows_,
            [&](int64_t row, int8_t* codes, float* scratch) {
              return quantize_input(input, row, part, codes, scratch);
            },
            workspace_);
        if (std::any_of(tiles.scales, tiles.scales + rows_, [](float scale) { return std::isnan(scale); }))
          finite_ = false;
      }
      spent(kInputs);
      before = &part;
      multiply_tiles(kernels_, part.shape, part.packed, tiles, part.bias, y + part.column, projection.columns,
                     workspace_);
      if (&projection != &model_.head) spent(kProducts);
    }
  }

  // A row as the product reads it: where it lies, or in `out`.
  const float* floats_of(const Input& input, int64_t row, int64_t k, float* out) const {
    const float* const x = input.data + row * input.stride;
    if (input.activation) {
      kernels_.activate(*input.activation, x, input.up_column ? x + input.up_column : nullptr, k, out);
    } else if (input.norm && input.norm->weight) {
      kernels_.normalize(x, k, *input.norm, out);
    } else {
      return x;
    }
    return out;
  }

  float quantize_input(const Input& input, int64_t row, const Matrix& part, int8_t* codes, float* scratch) const {
    const int64_t k = part.shape.k;
    if (input.norm && input.norm->weight) {
      const float* const x = input.data + row * input.stride;
      return normalize_quantize_row(kernels_, x, k, *input.norm, part.input_scale, codes, scratch);
    }
    return quantize_row(kernels_, floats_of(input, row, k, scratch), k, part.input_scale, codes);
  }

  void cap(float* logits) {
    const int64_t n = model_.head.columns;
    for_rows(rows_ * divide_up(n, 1024), 32 * 1024, workspace_, [&](int64_t piece, int) {
      const int64_t pieces = divide_up(n, 1024), row = piece / pieces, first = piece % pieces * 1024;
      for (int64_t i = row * n + first; i < row * n + std::min(n, first + 1024); ++i)
        logits[i] = model_.logit_softcap * std::tanh(logits[i] / model_.logit_softcap);
    });
  }

  const Kernels& kernels_;
  const Model& model_;
  const Cache& cache_;
  State& state_;
  Workspace& workspace_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
  std::vector<Run> runs_;
  int64_t rows_ = 0;
  float *x_ = nullptr, *y_ = nullptr, *qkv_ = nullptr, *attended_ = nullptr;
  std::atomic<bool> finite_ = true;
};

}  // namespace

int64_t forward(const Kernels& kernels, const Model& model, const Cache& cache, const int32_t* tokens,
                const std::vector<Run>& runs, const int64_t* wanted, int64_t wanted_count, float* logits, State& state,
                Workspace& workspace) {
  return Step(kernels, model, cache, state, workspace).run(tokens, runs, wanted, wanted_count, logits);
}

}  // namespace fptq
