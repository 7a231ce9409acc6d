// A whole decoder, from token ids to logits: blocks are data, and one function drives them all.
//
// Nothing here owns memory: weights, tables and the cache belong to the caller.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "operators.h"

namespace fptq {

// A linear layer, or several that read the same input in the same way, one below the other.
struct Matrix {
  Shape shape;
  const uint8_t* packed;
  const float* bias;                 // [n] or null
  std::optional<float> input_scale;  // of int types: static; without it dynamic
  int64_t column;                    // of the output, where this matrix's channels begin
};

// All that reads one input.
struct Projection {
  std::vector<Matrix> parts;
  int64_t columns = 0;
};

// Rotary position embedding of a head's first `dims` channels, in pairs dims / 2 apart.
struct Rotation {
  const float* cosines = nullptr;  // [positions, dims / 2], or null: none
  const float* sines = nullptr;
  int64_t dims = 0;
};

// A decoder block: x += attention(norm(x)), then x += MLP(norm(x)). Norms without a weight are left out.
struct Block {
  Norm attention_norm{}, query_norm{}, key_norm{}, attention_output_norm{}, mlp_norm{}, mlp_output_norm{};
  Projection qkv, attention_output, up, down;
  int64_t key_column = 0, value_column = 0;  // of qkv; queries begin at 0
  int64_t up_column = 0;                     // of `up`, where a gated MLP's second factor begins; 0: not gated
  Rotation rotation;
  int64_t window = 0;  // positions that a query sees, 0: all
  float key_scale = 1, value_scale = 1;
};

struct Embedding {
  Shape shape{};                  // [vocabulary, hidden]
  const uint8_t* data = nullptr;  // float types: row after row; int8: packed, as an output head would have it
  int file = -1;                  // without data: where float rows are read from,
  int64_t offset = 0;             // and the first one's place in the file
  float scale = 1;
  const float* positions = nullptr;  // [positions, hidden]: learned, added; or null
  Norm norm{};
};

struct Model {
  int64_t hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, inner = 0;
  Activation activation{};
  float softmax_scale = 1, attention_softcap = 0, logit_softcap = 0;  // caps: 0 for none
  const float* alibi_slopes = nullptr;                                // [heads] or null
  bool residual_from_norm = false;  // x = norm(x) + attention(norm(x)), and so for the MLP
  Embedding embedding;
  std::vector<Block> blocks;
  Norm final_norm{};
  Projection head;
};

struct Cache {
  int8_t* keys;    // [blocks, pages, kv_heads, head_dim, page_tokens]
  int8_t* values;  // [blocks, pages, kv_heads, page_tokens, head_dim]
  int64_t pages;
  int64_t page_tokens;
};

// Consecutive tokens of one sequence.
struct Run {
  int64_t rows;
  int64_t first_position;
  const int64_t* pages;  // of the sequence, all up to its last position
};

// What the time of steps is spent on.
enum Stage : int { kEmbedding, kInputs, kProducts, kCaching, kAttention, kResiduals, kHead, kStages };
constexpr const char* kStageNames[kStages] = {
    "embedding", "norms and quantization", "products", "filling the cache", "attention", "residuals", "output head"};

// A share of attention.
struct Piece {
  size_t run;
  AttentionPart part;
};

// What a step works in, besides the workspace.
struct State {
  Buffer hidden, output, qkv, attended, inner, floats;
  double seconds[kStages] = {};  // of all steps
  std::vector<int64_t> run_of, positions;
  std::vector<const int8_t*> pages;
  std::vector<Attention> attentions;
  std::vector<Piece> pieces;
};

// Runs the tokens of all runs, one after the other at most kRowBlock, through the model: their keys and values enter
// the cache, and the rows `wanted` get their logits [wanted_count, vocabulary]. Returns the block in which something
// can't be quantized since it isn't finite (the number of blocks for the head), -1 if all is well.
int64_t forward(const Kernels& kernels, const Model& model, const Cache& cache, const int32_t* tokens,
                const std::vector<Run>& runs, const int64_t* wanted, int64_t wanted_count, float* logits, State& state,
                Workspace& workspace);

}  // namespace fptq
