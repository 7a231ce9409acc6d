// The Python module fptq.runtime._native. Shapes are checked in fptq/runtime/kernels.py, before anything here is
// called; types and contiguity here, by nanobind, before any function is entered.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu.h"
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
          "attend",
          [](Session& s, Array<const float, 3> queries, Array<const int8_t, 4> keys, Array<const int8_t, 4> values,
             Array<const int64_t, 1> pages, float key_scale, float value_scale, float softmax_scale, float softcap,
             int64_t first_position, int64_t window, Optional<const float, 1> alibi_slopes, Array<float, 3> out) {
            const auto page_tokens = static_cast<int64_t>(keys.shape(1)),
                       kv_heads = static_cast<int64_t>(keys.shape(2));
            const auto head_dim = static_cast<int64_t>(keys.shape(3));
            const int64_t page_bytes = page_tokens * kv_heads * head_dim;
            std::vector<const int8_t*> key_pages, value_pages;
            for (size_t i = 0; i < pages.shape(0); ++i) {
              key_pages.push_back(keys.data() + pages.data()[i] * page_bytes);
              value_pages.push_back(values.data() + pages.data()[i] * page_bytes);
            }
            const Attention attention{.queries = queries.data(),
                                      .outputs = out.data(),
                                      .m = static_cast<int64_t>(queries.shape(0)),
                                      .heads = static_cast<int64_t>(queries.shape(1)),
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
}
