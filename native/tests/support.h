// What the tests share: faults, random numbers, arrays whose ends are watched.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace fptq::tests {

inline constexpr double kEps = 1.0 / (1 << 24);

struct Fault {
  std::string what;
};

inline void require(bool holds, const std::string& what) {
  if (!holds) throw Fault{what};
}

inline std::mt19937 random_bits(1);
inline double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random_bits);
}
inline int whole(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }

inline float bfloat16(double x) {
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

// Each throws a Fault. `scalar` is the target that others are compared with.
void test_operators(const Kernels& kernels);
void test_decoders(const Kernels& kernels, const Kernels& scalar);

}  // namespace fptq::tests
