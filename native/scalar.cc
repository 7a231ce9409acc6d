// Portable C++, one lane: the twin of the numpy reference.
#include "kernels.h"

namespace fptq {
namespace {

struct Isa {
  static constexpr const char* kName = "scalar";
  static constexpr int kLanes = 1;
  static constexpr int kRows = 2;
  static constexpr int kTilesFromNibbles = 2;
  static constexpr int kAttentionTile = 4;
  static constexpr bool kWideIsSigned = false;
  using Int = int32_t;
  using Float = float;
  struct Codes {
    uint8_t at[kStepInputs];
  };
  struct Step {
    int8_t at[kStepInputs];
  };

  static Codes load_bytes(const uint8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static void load_nibbles(const uint8_t* p, Codes& low, Codes& high) {
    for (int j = 0; j < kStepInputs; ++j) {
      low.at[j] = p[j] & 15;
      high.at[j] = p[j] >> 4;
    }
  }
  static void store_bytes(uint8_t* p, Codes c) { __builtin_memcpy(p, c.at, kStepInputs); }
  static Step load_step(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static Int splat_int(int32_t x) { return x; }
  static Int combine(Int a, Codes b) {
    int32_t bits;
    __builtin_memcpy(&bits, b.at, kStepInputs);
    return a ^ bits;
  }
  static void hide(Codes& codes) { asm volatile("" : "+m"(codes)); }
  template <bool kWide>
  static void dot(Int& sum, Codes codes, Step step) {
    for (int j = 0; j < kStepInputs; ++j) sum += codes.at[j] * step.at[j];
  }

  static Float to_float(Int x) { return static_cast<float>(x); }
  static Float load_scales(const uint8_t* p) { return from_bits(static_cast<uint32_t>(p[0] | p[1] << 8) << 16); }
  static Float load_int8(const int8_t* p) { return *p; }
  static void store_int8(int8_t* p, Float x) { *p = x == x ? static_cast<int8_t>(x) : int8_t{-128}; }
  static Float splat(float x) { return x; }
  static Float load(const float* p) {  // of packed weights, which lie anywhere
    float x;
    __builtin_memcpy(&x, p, 4);
    return x;
  }
  static void store(float* p, Float x) { *p = x; }
  static Float add(Float a, Float b) { return a + b; }
  static Float subtract(Float a, Float b) { return a - b; }
  static Float multiply(Float a, Float b) { return a * b; }
  static Float divide(Float a, Float b) { return a / b; }
  static Float multiply_add(Float a, Float b, Float c) { return a * b + c; }
  static Float max(Float a, Float b) { return a > b ? a : b; }
  static Float min(Float a, Float b) { return a < b ? a : b; }
  static Float absolute(Float x) { return __builtin_fabsf(x); }
  static Float round(Float x) { return __builtin_nearbyintf(x); }
  static Float where_less(Float a, Float b, Float yes, Float no) { return a < b ? yes : no; }
  static Float power_of_two(Float n) {
    if (n != n) return n;  // no integer
    return from_bits(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  }
  static float reduce_add(Float x) { return x; }
  static float reduce_max(Float x) { return x; }

 private:
  static float from_bits(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
  }
};

#include "body.h"

}  // namespace

extern const Kernels kScalar;
constinit const Kernels kScalar = kernels<Isa>();

}  // namespace fptq
