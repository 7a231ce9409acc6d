// Arm NEON with dotprod (Armv8.2): 4 lanes, sdot. Signed times signed: codes 0..15 are signed bytes as they are; those
// of int8 panels become q again, so that their accumulators start at 0.
#include <arm_neon.h>

#include "kernels.h"

namespace fptq {
namespace {

struct Isa {
  static constexpr const char* kName = "neon";
  static constexpr int kLanes = 4;
  static constexpr int kRows = 2;  // sixteen accumulators, eight vectors of codes, a step, constants
  static constexpr int kTilesFromNibbles = 2;
  static constexpr int kAttentionTile = 8;
  static constexpr bool kWideIsSigned = true;
  using Int = int32x4_t;
  using Float = float32x4_t;
  using Codes = uint8x16_t;
  using Step = int8x16_t;

  static Codes load_bytes(const uint8_t* p) { return vld1q_u8(p); }
  static void load_nibbles(const uint8_t* p, Codes& low, Codes& high) {
    const uint8x16_t both = vld1q_u8(p);
    low = vandq_u8(both, vdupq_n_u8(15));
    high = vshrq_n_u8(both, 4);
  }
  static void store_bytes(uint8_t* p, Codes c) { vst1q_u8(p, c); }
  static Step load_step(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  static Int splat_int(int32_t x) { return vdupq_n_s32(x); }
  static Int combine(Int a, Codes b) { return veorq_s32(a, vreinterpretq_s32_u8(b)); }
  static void hide(Codes& codes) { asm volatile("" : "+w"(codes)); }
  template <bool kWide>
  static void dot(Int& sum, Codes codes, Step step) {
    if constexpr (kWide) codes = veorq_u8(codes, vdupq_n_u8(128));
    sum = vdotq_s32(sum, vreinterpretq_s8_u8(codes), step);
  }

  static Float to_float(Int x) { return vcvtq_f32_s32(x); }
  static Float load_scales(const uint8_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
  }
  static Float load_int8(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  }
  static void store_int8(int8_t* p, Float x) {
    const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(x));
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    __builtin_memcpy(p, &bytes, 4);
  }
  static Float splat(float x) { return vdupq_n_f32(x); }
  static Float load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Float x) { vst1q_f32(p, x); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float subtract(Float a, Float b) { return vsubq_f32(a, b); }
  static Float multiply(Float a, Float b) { return vmulq_f32(a, b); }
  static Float divide(Float a, Float b) { return vdivq_f32(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Float max(Float a, Float b) { return vmaxq_f32(a, b); }
  static Float min(Float a, Float b) { return vminq_f32(a, b); }
  static Float absolute(Float x) { return vabsq_f32(x); }
  static Float round(Float x) { return vrndnq_f32(x); }
  static Float where_less(Float a, Float b, Float yes, Float no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
  static Float power_of_two(Float n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
  }
  static float reduce_add(Float x) {  // halves first, as all targets do
    const float32x2_t halves = vadd_f32(vget_low_f32(x), vget_high_f32(x));
    return vget_lane_f32(halves, 0) + vget_lane_f32(halves, 1);
  }
  static float reduce_max(Float x) { return vmaxvq_f32(x); }
};

#include "body.h"

}  // namespace

extern const Kernels kNeon;
constinit const Kernels kNeon = kernels<Isa>();

}  // namespace fptq
