// The Python module fptq.runtime._native. Shapes are checked in fptq/runtime/kernels.py, before anything here is
// called; types and contiguity here, by nanobind, before any function is entered.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu.h"
#include "decoder.h"
#include "operators.h"

namespace nb = nanobind;
using namespace fptq;

namespace {

template <class T, int kDimensions>
using Array = nb::ndarray<T, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;
template <class T, int kDimensions>
using Optional = std::optional<Array<T, kDimensions>>;

template <class A>
auto data_or_null(const A& array) -> decltype(array->data()) {
  return array ? array->data() : nullptr;
}

const Kernels& find(const std::string& name) {
  for (const auto& target : targets())
    if (target.name == name) {
      if (target.kernels) return *target.kernels;
      throw std::invalid_argument(name + ": this CPU has no " + target.missing);
    }
  throw std::invalid_argument(name + ": no such target in this build");
}

// A target with threads and memory. Calls from several Python threads wait for each other.
class Session {
 public:
  Session(const std::string& target, int threads) : kernels_(find(target)), workspace_(threads) {}

  // Calls function(kernels, workspace) without the interpreter's lock, and alone.
  template <class Function>
  void run(const Function& function) {
    workspace_.pool.revive();
    nb::gil_scoped_release release;
    const auto lock = workspace_.pool.lock();
    function(kernels_, workspace_);
  }

 private:
  const Kernels& kernels_;
  Workspace workspace_;
};

// A projection's matrix as Python gives it: packed weights, n, k, group size, bits, bias, static input scale, first
// output column; a norm's: weight, bias, eps, center; tables of cosines and sines.
using MatrixData = std::tuple<Array<const uint8_t, 1>, int64_t, int64_t, int64_t, int, Optional<const float, 1>,
                              std::optional<float>, int64_t>;
using NormData = std::optional<std::tuple<Array<const float, 1>, Optional<const float, 1>, float, bool>>;
using RotationData = std::optional<std::tuple<Array<const float, 2>, Array<const float, 2>>>;
using RunData = std::tuple<int64_t, int64_t, Array<const int64_t, 1>>;

// A model on a session's threads. It keeps the arrays that it was given.
class Decoder {
 public:
  Decoder(Session& session, int64_t hidden, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t inner,
          int activation, float softmax_scale, float attention_softcap, float logit_softcap,
          Optional<const float, 1> alibi_slopes, bool residual_from_norm)
      : session_(session) {
    model_.hidden = hidden;
    model_.heads = heads;
    model_.kv_heads = kv_heads;
    model_.head_dim = head_dim;
    model_.inner = inner;
    model_.activation = static_cast<Activation>(activation);
    model_.softmax_scale = softmax_scale;
    model_.attention_softcap = attention_softcap;
    model_.logit_softcap = logit_softcap;
    model_.alibi_slopes = keep(alibi_slopes);
    model_.residual_from_norm = residual_from_norm;
  }

  void set_embedding(Optional<const uint8_t, 1> data, int file, int64_t offset, int64_t n, int64_t k,
                     int64_t group_size, int bits, float scale, Optional<const float, 2> positions,
                     const NormData& norm) {
    model_.embedding = {{n, k, group_size, static_cast<WeightType>(bits)},
                        keep(data),
                        file,
                        offset,
                        scale,
                        keep(positions),
                        to_norm(norm)};
  }

  void add_block(const std::vector<NormData>& norms, const std::vector<std::vector<MatrixData>>& projections,
                 const std::vector<int64_t>& columns, int64_t key_column, int64_t value_column, int64_t up_column,
                 const RotationData& rotation, int64_t window, float key_scale, float value_scale) {
    Block b;
    Norm* const all_norms[] = {&b.attention_norm,        &b.query_norm, &b.key_norm,
                               &b.attention_output_norm, &b.mlp_norm,   &b.mlp_output_norm};
    for (size_t i = 0; i < std::size(all_norms); ++i) *all_norms[i] = to_norm(norms.at(i));
    Projection* const all_projections[] = {&b.qkv, &b.attention_output, &b.up, &b.down};
    for (size_t i = 0; i < std::size(all_projections); ++i)
      *all_projections[i] = to_projection(projections.at(i), columns.at(i));
    b.key_column = key_column;
    b.value_column = value_column;
    b.up_column = up_column;
    if (rotation) {
      const auto& [cosines, sines] = *rotation;
      b.rotation = {keep(cosines), keep(sines), 2 * static_cast<int64_t>(cosines.shape(1))};
    }
    b.window = window;
    b.key_scale = key_scale;
    b.value_scale = value_scale;
    model_.blocks.push_back(std::move(b));
  }

  void set_head(const NormData& norm, const std::vector<MatrixData>& head, int64_t columns) {
    model_.final_norm = to_norm(norm);
    model_.head = to_projection(head, columns);
  }

  int64_t forward(Array<const int32_t, 1> tokens, const std::vector<RunData>& runs, Array<int8_t, 5> keys,
                  Array<int8_t, 5> values, Array<const int64_t, 1> wanted, Array<float, 2> logits) {
    std::vector<Run> all;
    for (const auto& [rows, first_position, pages] : runs) all.push_back({rows, first_position, pages.data()});
    const Cache cache{keys.data(), values.data(), static_cast<int64_t>(keys.shape(1)),
                      static_cast<int64_t>(keys.shape(4))};
    int64_t result = -1;
    session_.run([&](const Kernels& k, Workspace& w) {
      result = fptq::forward(k, model_, cache, tokens.data(), all, wanted.data(), static_cast<int64_t>(wanted.shape(0)),
                             logits.data(), state_, w);
    });
    return result;
  }

  std::vector<std::tuple<std::string, double>> take_times() {
    std::vector<std::tuple<std::string, double>> times;
    for (int stage = 0; stage < kStages; ++stage)
      times.emplace_back(kStageNames[stage], std::exchange(state_.seconds[stage], 0.0));
    return times;
  }

 private:
  template <class A>
  auto keep(const A& array) -> decltype(array.data()) {
    kept_.push_back(std::make_shared<A>(array));
    return array.data();
  }
  template <class A>
  auto keep(const std::optional<A>& array) -> decltype(array->data()) {
    return array ? keep(*array) : nullptr;
  }

  Norm to_norm(const NormData& data) {
    if (!data) return {};
    const auto& [weight, bias, eps, center] = *data;
    return {keep(weight), keep(bias), eps, center};
  }

  Projection to_projection(const std::vector<MatrixData>& parts, int64_t columns) {
    Projection projection;
    projection.columns = columns;
    for (const auto& [packed, n, k, group_size, bits, bias, input_scale, column] : parts)
      projection.parts.push_back(
          {{n, k, group_size, static_cast<WeightType>(bits)}, keep(packed), keep(bias), input_scale, column});
    return projection;
  }

  Session& session_;
  Model model_;
  State state_;
  std::vector<std::shared_ptr<void>> kept_;
};

Shape shape_of(const Array<const int8_t, 2>& codes, const Array<const float, 2>& scales, int bits) {
  const auto k = static_cast<int64_t>(codes.shape(1));
  return {static_cast<int64_t>(codes.shape(0)), k, k / static_cast<int64_t>(scales.shape(1)),
          static_cast<WeightType>(bits)};
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // sessions that are global in Python live until the process ends
  m.doc() = "Kernels for W4A8 on CPUs; see fptq.runtime.kernels.";

  m.def("targets", [] {
    std::vector<std::tuple<std::string, std::string>> all;
    for (const auto& target : targets()) all.emplace_back(target.name, target.missing);
    return all;
  });
  m.def("cpu_name", cpu_name);

  // Arrays of another type or order are refused: an implicit copy would take an output's place.
  const auto array = nb::arg().noconvert();
  const auto number = nb::arg();
  nb::class_<Session>(m, "Session")
      .def(nb::init<const std::string&, int>())
      .def(
          "pack",
          [](Session& s, Array<const int8_t, 2> codes, Array<const float, 2> scales, int bits,
             Array<uint8_t, 1> packed) {
            const Shape shape = shape_of(codes, scales, bits);
            s.run(
                [&](const Kernels&, Workspace& w) { pack(shape, codes.data(), scales.data(), packed.data(), w.pool); });
          },
          array, array, number, array)
      .def(
          "pack_words",
          [](Session& s, Array<const uint32_t, 2> words, Array<const uint16_t, 2> scales, Array<uint8_t, 1> packed) {
            const auto k = static_cast<int64_t>(words.shape(1)) * 8;
            const Shape shape{static_cast<int64_t>(words.shape(0)), k, k / static_cast<int64_t>(scales.shape(1)),
                              WeightType::int4};
            s.run([&](const Kernels&, Workspace& w) {
              pack_words(shape, words.data(), scales.data(), packed.data(), w.pool);
            });
          },
          array, array, array)
      .def(
          "pack_floats",
          [](Session& s, Array<const uint8_t, 2> weights, int bits, Array<uint8_t, 1> packed) {
            const auto k = static_cast<int64_t>(weights.shape(1)) * 8 / bits;
            const Shape shape{static_cast<int64_t>(weights.shape(0)), k, k, static_cast<WeightType>(bits)};
            s.run([&](const Kernels&, Workspace& w) { pack_floats(shape, weights.data(), packed.data(), w.pool); });
          },
          array, number, array)
      .def(
          "multiply_floats",
          [](Session& s, Array<const uint8_t, 1> packed, int bits, Array<const float, 2> x,
             Optional<const float, 1> bias, Array<float, 2> y) {
            const auto n = static_cast<int64_t>(y.shape(1)), k = static_cast<int64_t>(x.shape(1));
            const Shape shape{n, k, k, static_cast<WeightType>(bits)};
            s.run([&](const Kernels& kernels, Workspace& w) {
              multiply_floats(kernels, shape, packed.data(), static_cast<int64_t>(x.shape(0)), x.data(),
                              data_or_null(bias), y.data(), n, w);
            });
          },
          array, number, array, array, array)
      .def(
          "activate",
          [](Session& s, int activation, Array<const float, 2> x, Optional<const float, 2> up, Array<float, 2> out) {
            const auto m = static_cast<int64_t>(x.shape(0)), k = static_cast<int64_t>(x.shape(1));
            const float* const factors = data_or_null(up);
            s.run([&](const Kernels& kernels, Workspace& w) {
              for_rows(m, k, w, [&](int64_t row, int) {
                kernels.activate(static_cast<Activation>(activation), x.data() + row * k,
                                 factors ? factors + row * k : nullptr, k, out.data() + row * k);
              });
            });
          },
          number, array, array, array)
      .def(
          "multiply",
          [](Session& s, Array<const uint8_t, 1> packed, int64_t group_size, int bits,
             Array<const int8_t, 2> activations, Array<const float, 1> scales, Optional<const float, 1> bias,
             Array<float, 2> y) {
            const Shape shape{static_cast<int64_t>(y.shape(1)), static_cast<int64_t>(activations.shape(1)), group_size,
                              static_cast<WeightType>(bits)};
            s.run([&](const Kernels& k, Workspace& w) {
              multiply(k, shape, packed.data(), static_cast<int64_t>(y.shape(0)), activations.data(), scales.data(),
                       data_or_null(bias), y.data(), w);
            });
          },
          array, number, number, array, array, array, array)
      .def(
          "linear",
          [](Session& s, Array<const uint8_t, 1> packed, int64_t group_size, int bits, Array<const float, 2> x,
             std::optional<float> scale, Optional<const float, 1> bias, Array<float, 2> y) {
            const Shape shape{static_cast<int64_t>(y.shape(1)), static_cast<int64_t>(x.shape(1)), group_size,
                              static_cast<WeightType>(bits)};
            s.run([&](const Kernels& k, Workspace& w) {
              linear(k, shape, packed.data(), static_cast<int64_t>(x.shape(0)), x.data(), scale, data_or_null(bias),
                     y.data(), w);
            });
          },
          array, number, number, array, number, array, array)
      .def(
          "quantize",
          [](Session& s, Array<const float, 2> x, std::optional<float> scale, Array<int8_t, 2> codes,
             Array<float, 1> scales) {
            s.run([&](const Kernels& k, Workspace& w) {
              quantize(k, x.data(), static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)), scale,
                       codes.data(), scales.data(), w);
            });
          },
          array, number, array, array)
      .def(
          "normalize",
          [](Session& s, Array<const float, 2> x, Array<const float, 1> weight, Optional<const float, 1> bias,
             float eps, bool center, Array<float, 2> out) {
            const Norm norm{weight.data(), data_or_null(bias), eps, center};
            s.run([&](const Kernels& k, Workspace& w) {
              normalize(k, x.data(), static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)), norm,
                        out.data(), w);
            });
          },
          array, array, array, number, number, array)
      .def(
          "normalize_quantize",
          [](Session& s, Array<const float, 2> x, Array<const float, 1> weight, Optional<const float, 1> bias,
             float eps, bool center, std::optional<float> scale, Array<int8_t, 2> codes, Array<float, 1> scales) {
            const Norm norm{weight.data(), data_or_null(bias), eps, center};
            s.run([&](const Kernels& k, Workspace& w) {
              normalize_quantize(k, x.data(), static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)), norm,
                                 scale, codes.data(), scales.data(), w);
            });
          },
          array, array, array, number, number, number, array, array)
      .def(
          "round_in_turn",
          [](Session& s, Array<const float, 2> values, Array<const float, 2> steps, Array<const float, 2> factor,
             int bits, Array<int8_t, 2> codes, Array<float, 2> errors) {
            s.run([&](const Kernels& k, Workspace& w) {
              round_in_turn(k, static_cast<int64_t>(values.shape(0)), static_cast<int64_t>(values.shape(1)),
                            values.data(), steps.data(), factor.data(), bits, codes.data(), errors.data(), w);
            });
          },
          array, array, array, number, array, array)
      .def(
          "attend",
          [](Session& s, Array<const float, 3> queries, Array<const int8_t, 4> keys, Array<const int8_t, 4> values,
             Array<const int64_t, 1> pages, float key_scale, float value_scale, float softmax_scale, float softcap,
             int64_t first_position, int64_t window, Optional<const float, 1> alibi_slopes, Array<float, 3> out) {
            const auto kv_heads = static_cast<int64_t>(keys.shape(1)),
                       page_tokens = static_cast<int64_t>(keys.shape(3));
            const auto head_dim = static_cast<int64_t>(keys.shape(2)), heads = static_cast<int64_t>(queries.shape(1));
            const int64_t page_bytes = page_tokens * kv_heads * head_dim;
            std::vector<const int8_t*> key_pages, value_pages;
            for (size_t i = 0; i < pages.shape(0); ++i) {
              key_pages.push_back(keys.data() + pages.data()[i] * page_bytes);
              value_pages.push_back(values.data() + pages.data()[i] * page_bytes);
            }
            const Attention attention{.queries = queries.data(),
                                      .outputs = out.data(),
                                      .query_stride = heads * head_dim,
                                      .output_stride = heads * head_dim,
                                      .m = static_cast<int64_t>(queries.shape(0)),
                                      .heads = heads,
                                      .kv_heads = kv_heads,
                                      .head_dim = head_dim,
                                      .key_pages = key_pages.data(),
                                      .value_pages = value_pages.data(),
                                      .page_tokens = page_tokens,
                                      .key_scale = key_scale,
                                      .value_scale = value_scale,
                                      .softmax_scale = softmax_scale,
                                      .softcap = softcap,
                                      .first_position = first_position,
                                      .window = window,
                                      .alibi_slopes = data_or_null(alibi_slopes)};
            s.run([&](const Kernels& k, Workspace& w) { attend(k, attention, w); });
          },
          array, array, array, array, number, number, number, number, number, number, array, array)
      .def(
          "read",
          [](Session& s, Array<const uint8_t, 1> data) {
            s.run([&](const Kernels& k, Workspace& w) { measure_read(k, data.data(), data.size(), w); });
          },
          array)
      .def("dot", [](Session& s, int64_t steps) {
        int64_t operations = 0;
        s.run([&](const Kernels& k, Workspace& w) { operations = measure_dot(k, steps, w); });
        return operations;
      });

  nb::class_<Decoder>(m, "Decoder")
      .def(nb::init<Session&, int64_t, int64_t, int64_t, int64_t, int64_t, int, float, float, float,
                    Optional<const float, 1>, bool>(),
           nb::keep_alive<1, 2>(), nb::arg("session"), nb::arg("hidden"), nb::arg("heads"), nb::arg("kv_heads"),
           nb::arg("head_dim"), nb::arg("inner"), nb::arg("activation"), nb::arg("softmax_scale"),
           nb::arg("attention_softcap"), nb::arg("logit_softcap"), nb::arg("alibi_slopes").none(),
           nb::arg("residual_from_norm"))
      .def("set_embedding", &Decoder::set_embedding, nb::arg("data").none(), nb::arg("file"), nb::arg("offset"),
           nb::arg("n"), nb::arg("k"), nb::arg("group_size"), nb::arg("bits"), nb::arg("scale"),
           nb::arg("positions").none(), nb::arg("norm").none())
      .def("add_block", &Decoder::add_block, nb::arg("norms"), nb::arg("projections"), nb::arg("columns"),
           nb::arg("key_column"), nb::arg("value_column"), nb::arg("up_column"), nb::arg("rotation").none(),
           nb::arg("window"), nb::arg("key_scale"), nb::arg("value_scale"))
      .def("set_head", &Decoder::set_head, nb::arg("norm").none(), nb::arg("head"), nb::arg("columns"))
      .def("forward", &Decoder::forward, array, number, array, array, array, array)
      .def("take_times", &Decoder::take_times);
}
