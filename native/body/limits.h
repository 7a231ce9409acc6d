// The limits of the machine, for benchmarks.

// Reads `bytes` bytes and returns something that depends on all of them: the memory's speed.
template <class Isa>
int64_t read(const uint8_t* data, int64_t bytes) {
  constexpr int64_t size = Isa::kLanes * 4;
  auto a = Isa::splat_int(0), b = a, c = a, d = a;
  for (int64_t i = 0; i + 4 * size <= bytes; i += 4 * size) {
    a = Isa::combine(a, Isa::load_bytes(data + i));
    b = Isa::combine(b, Isa::load_bytes(data + i + size));
    c = Isa::combine(c, Isa::load_bytes(data + i + 2 * size));
    d = Isa::combine(d, Isa::load_bytes(data + i + 3 * size));
  }
  const auto ab = Isa::add(Isa::to_float(a), Isa::to_float(b)), cd = Isa::add(Isa::to_float(c), Isa::to_float(d));
  return Isa::reduce_add(Isa::add(ab, cd)) != 0.0f;
}

// Runs `steps` × kChains independent dot instructions on registers and returns the multiplications and additions done.
template <class Isa>
int64_t dot(int64_t steps) {
  constexpr int kChains = 12;
  const uint8_t ones[Isa::kLanes * kStepInputs] = {1};
  const int8_t four[kStepInputs] = {1};
  auto codes = Isa::load_bytes(ones);
  const auto step = Isa::load_step(four);
  typename Isa::Int sum[kChains];
  typename Isa::Float total = Isa::splat(0.0f);
  // Unrolled, or the sums would be an array in memory.
#pragma GCC unroll 16
  for (int j = 0; j < kChains; ++j) sum[j] = Isa::splat_int(0);
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kChains; ++j) {
      Isa::hide(codes);  // from the compiler, which would take what is the same each time out of the loop
      Isa::template dot<false>(sum[j], codes, step);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kChains; ++j) total = Isa::add(total, Isa::to_float(sum[j]));
  return Isa::reduce_add(total) < 0 ? 0 : steps * kChains * Isa::kLanes * kStepInputs * 2;
}
