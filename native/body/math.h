// Functions of a vector.

// e^x for x <= 88, 0 below -87.3; relative error below 4.5·2^-24: x = n·ln 2 + r, |r| <= ln 2 / 2, Taylor to r^6 / 720.
template <class Isa>
typename Isa::Float exponential(typename Isa::Float x) {
  using Float = typename Isa::Float;
  const Float lowest = Isa::splat(-87.3f);
  const Float y = Isa::max(lowest, x);
  const Float n = Isa::round(Isa::multiply(y, Isa::splat(1.44269504f)));
  Float r = Isa::multiply_add(n, Isa::splat(-0.693359375f), y);  // ln 2 in two parts, the first exact times n
  r = Isa::multiply_add(n, Isa::splat(2.12194440e-4f), r);
  Float sum = Isa::splat(1.0f / 720);
  constexpr float kTaylor[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float c : kTaylor) sum = Isa::multiply_add(sum, r, Isa::splat(c));
  return Isa::where_less(x, lowest, Isa::splat(0.0f), Isa::multiply(sum, Isa::power_of_two(n)));
}

template <class Isa>
typename Isa::Float hyperbolic_tangent(typename Isa::Float x) {
  const auto limited = Isa::min(Isa::splat(15.0f), Isa::max(Isa::splat(-15.0f), x));
  const auto e = exponential<Isa>(Isa::add(limited, limited));
  const auto one = Isa::splat(1.0f);
  return Isa::divide(Isa::subtract(e, one), Isa::add(e, one));
}

// erf of x >= 0, absolute error below 2.5e-7: Abramowitz and Stegun, 7.1.26.
template <class Isa>
typename Isa::Float error_function(typename Isa::Float x) {
  using Float = typename Isa::Float;
  const Float one = Isa::splat(1.0f);
  const Float t = Isa::divide(one, Isa::multiply_add(Isa::splat(0.3275911f), x, one));
  Float sum = Isa::splat(1.061405429f);
  constexpr float kCoefficients[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  for (const float c : kCoefficients) sum = Isa::multiply_add(sum, t, Isa::splat(c));
  const Float e = exponential<Isa>(Isa::subtract(Isa::splat(0.0f), Isa::multiply(x, x)));
  return Isa::subtract(one, Isa::multiply(Isa::multiply(sum, t), e));
}
