// Rounding columns of a weight matrix in turn, many rows at once: see Rounding.

template <class Isa>
void round_in_turn(const Rounding& r) {
  constexpr int L = Isa::kLanes, kVectors = kRoundingRows / L;
  using Float = typename Isa::Float;
  const auto lowest = Isa::splat(r.lowest), highest = Isa::splat(r.highest);
  // Valid lanes of a vector; what the others hold means nothing.
  const auto count = [&](int64_t v) { return static_cast<int>(r.rows - v * L < L ? r.rows - v * L : L); };
  for (int64_t i = 0; i < r.columns; ++i) {
    const float* const factor = r.factor + i * r.columns;
    const float* earlier = r.scratch;
    // Sums of every other column: a single one would wait for itself.
    Float even[kVectors], odd[kVectors];
    for (int v = 0; v < kVectors; ++v) even[v] = odd[v] = Isa::splat(0.0f);
    int64_t j = 0;
    for (; j + 2 <= i; j += 2, earlier += 2 * kRoundingRows) {
      const auto a = Isa::splat(factor[j]), b = Isa::splat(factor[j + 1]);
      for (int v = 0; v < kVectors; ++v) {
        even[v] = Isa::multiply_add(a, Isa::load(earlier + v * L), even[v]);
        odd[v] = Isa::multiply_add(b, Isa::load(earlier + kRoundingRows + v * L), odd[v]);
      }
    }
    if (j < i) {
      const auto a = Isa::splat(factor[j]);
      for (int v = 0; v < kVectors; ++v) even[v] = Isa::multiply_add(a, Isa::load(earlier + v * L), even[v]);
    }
    const auto diagonal = Isa::splat(factor[i]);
    for (int v = 0; v < kVectors && count(v) > 0; ++v) {
      const int64_t at = i * r.stride + v * L;
      const auto step = load_some<Isa>(r.steps + at, count(v));
      const auto value = Isa::subtract(load_some<Isa>(r.values + at, count(v)), Isa::add(even[v], odd[v]));
      const auto code = to_code<Isa>(value, step, lowest, highest);
      const auto error = Isa::divide(Isa::subtract(value, Isa::multiply(code, step)), diagonal);
      Isa::store(r.scratch + i * kRoundingRows + v * L, error);
      store_some<Isa>(r.errors + at, count(v), error);
      store_codes<Isa>(r.codes + at, count(v), code);
    }
  }
}
