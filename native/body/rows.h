// Rows: quantization and norms.

// Calls function(first index, how many of its lanes are valid, vector) for every vector of a row; the last is padded.
template <class Isa, class Function>
void for_vectors(const float* x, int64_t k, const Function& function) {
  constexpr int L = Isa::kLanes;
  int64_t i = 0;
  for (; i + L <= k; i += L) function(i, L, Isa::load(x + i));
  if (i < k) {
    float rest[L] = {};
    for (int64_t j = i; j < k; ++j) rest[j - i] = x[j];
    function(i, static_cast<int>(k - i), Isa::load(rest));
  }
}

template <class Isa>
typename Isa::Float load_some(const float* x, int count) {
  if (count == Isa::kLanes) return Isa::load(x);
  float rest[Isa::kLanes] = {};
  for (int j = 0; j < count; ++j) rest[j] = x[j];
  return Isa::load(rest);
}

template <class Isa>
void store_some(float* out, int count, typename Isa::Float x) {
  if (count == Isa::kLanes) return Isa::store(out, x);
  float rest[Isa::kLanes];
  Isa::store(rest, x);
  for (int j = 0; j < count; ++j) out[j] = rest[j];
}

template <class Isa>
void store_codes(int8_t* out, int count, typename Isa::Float x) {
  if (count == Isa::kLanes) return Isa::store_int8(out, x);
  int8_t rest[Isa::kLanes];
  Isa::store_int8(rest, x);
  for (int j = 0; j < count; ++j) out[j] = rest[j];
}

// Whole numbers from lowest to highest, or NaN where x is: max and min give the second operand if either is NaN.
template <class Isa>
typename Isa::Float to_code(typename Isa::Float x, typename Isa::Float scale,
                            typename Isa::Float lowest = Isa::splat(-128.0f),
                            typename Isa::Float highest = Isa::splat(127.0f)) {
  return Isa::min(highest, Isa::max(lowest, Isa::round(Isa::divide(x, scale))));
}

// 0 if all lanes of everything added are finite, else NaN.
template <class Isa>
struct Finite {
  typename Isa::Float sum = Isa::splat(0.0f);
  void add(typename Isa::Float x) { sum = Isa::multiply_add(x, Isa::splat(0.0f), sum); }
  float result() const { return Isa::reduce_add(sum); }
};

template <class Isa>
bool quantize(const float* x, int64_t k, float scale, int8_t* codes) {
  const auto step = Isa::splat(scale);
  Finite<Isa> finite;
  for_vectors<Isa>(x, k, [&](int64_t i, int count, typename Isa::Float v) {
    const auto code = to_code<Isa>(v, step);
    finite.add(code);
    store_codes<Isa>(codes + i, count, code);
  });
  return finite.result() == 0.0f;
}

template <class Isa>
float quantize_dynamic(const float* x, int64_t k, int8_t* codes) {
  auto largest = Isa::splat(0.0f);
  Finite<Isa> finite;
  for_vectors<Isa>(x, k, [&](int64_t, int, typename Isa::Float v) {
    largest = Isa::max(largest, Isa::absolute(v));
    finite.add(v);
  });
  float scale = Isa::reduce_max(largest) / 127.0f;
  if (!(scale > 0.0f)) scale = 1.0f;
  quantize<Isa>(x, k, scale, codes);
  return scale + finite.result();
}

// Hands function(i, count, y) the normalized row, vector by vector.
template <class Isa, class Function>
void normalized(const float* x, int64_t k, const Norm& norm, const Function& function) {
  using Float = typename Isa::Float;
  float mean = 0.0f;
  if (norm.center) {
    Float sum = Isa::splat(0.0f);
    for_vectors<Isa>(x, k, [&](int64_t, int, Float v) { sum = Isa::add(sum, v); });
    mean = Isa::reduce_add(sum) / static_cast<float>(k);
  }
  const Float center = Isa::splat(mean);
  Float squares = Isa::splat(0.0f);
  for_vectors<Isa>(x, k, [&](int64_t, int count, Float v) {
    Float d = Isa::subtract(v, center);
    if (count < Isa::kLanes) {  // the padding isn't at the mean
      float some[Isa::kLanes] = {};
      store_some<Isa>(some, count, d);
      d = Isa::load(some);
    }
    squares = Isa::multiply_add(d, d, squares);
  });
  const Float r = Isa::splat(1.0f / __builtin_sqrtf(Isa::reduce_add(squares) / static_cast<float>(k) + norm.eps));
  for_vectors<Isa>(x, k, [&](int64_t i, int count, Float v) {
    Float y = Isa::multiply(Isa::multiply(Isa::subtract(v, center), r), load_some<Isa>(norm.weight + i, count));
    if (norm.bias) y = Isa::add(y, load_some<Isa>(norm.bias + i, count));
    function(i, count, y);
  });
}

template <class Isa>
void normalize(const float* x, int64_t k, const Norm& norm, float* out) {
  normalized<Isa>(x, k, norm, [&](int64_t i, int count, typename Isa::Float y) { store_some<Isa>(out + i, count, y); });
}

template <class Isa>
bool normalize_quantize(const float* x, int64_t k, const Norm& norm, float scale, int8_t* codes) {
  const auto step = Isa::splat(scale);
  Finite<Isa> finite;
  normalized<Isa>(x, k, norm, [&](int64_t i, int count, typename Isa::Float y) {
    const auto code = to_code<Isa>(y, step);
    finite.add(code);
    store_codes<Isa>(codes + i, count, code);
  });
  return finite.result() == 0.0f;
}

template <class Isa, Activation kActivation>
typename Isa::Float activated(typename Isa::Float x) {
  using Float = typename Isa::Float;
  const Float zero = Isa::splat(0.0f), one = Isa::splat(1.0f), half = Isa::splat(0.5f);
  if constexpr (kActivation == Activation::silu) {
    // Below -87 the result is under 2e-36: a zero, or NaN of -inf, as e^-x would overflow.
    const Float lowest = Isa::splat(-87.0f);
    const Float e = exponential<Isa>(Isa::subtract(zero, Isa::max(lowest, x)));
    return Isa::where_less(x, lowest, Isa::multiply(x, zero), Isa::divide(x, Isa::add(one, e)));
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    // 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))
    const Float cube = Isa::multiply(Isa::multiply(x, x), x);
    const Float inner = Isa::multiply(Isa::splat(0.797884561f), Isa::multiply_add(Isa::splat(0.044715f), cube, x));
    return Isa::multiply(Isa::multiply(half, x), Isa::add(one, hyperbolic_tangent<Isa>(inner)));
  } else if constexpr (kActivation == Activation::gelu) {
    const Float y = error_function<Isa>(Isa::multiply(Isa::absolute(x), Isa::splat(0.707106781f)));
    return Isa::multiply(Isa::multiply(half, x), Isa::where_less(x, zero, Isa::subtract(one, y), Isa::add(one, y)));
  } else {
    return Isa::where_less(x, zero, zero, x);
  }
}

template <class Isa, Activation kActivation>
void activate_row(const float* x, const float* up, int64_t k, float* out) {
  for_vectors<Isa>(x, k, [&](int64_t i, int count, typename Isa::Float v) {
    auto y = activated<Isa, kActivation>(v);
    if (up) y = Isa::multiply(y, load_some<Isa>(up + i, count));
    store_some<Isa>(out + i, count, y);
  });
}

template <class Isa>
void activate(Activation activation, const float* x, const float* up, int64_t k, float* out) {
  switch (activation) {
    case Activation::silu:
      return activate_row<Isa, Activation::silu>(x, up, k, out);
    case Activation::gelu:
      return activate_row<Isa, Activation::gelu>(x, up, k, out);
    case Activation::gelu_tanh:
      return activate_row<Isa, Activation::gelu_tanh>(x, up, k, out);
    case Activation::relu:
      return activate_row<Isa, Activation::relu>(x, up, k, out);
  }
}
