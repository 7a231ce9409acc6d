// AVX-512 with VNNI: 16 lanes, vpdpbusd. Sixteen accumulators, eight rows by two vectors, cover its latency of 5 cycles
// on two ports; with codes and a step 19 of 32 registers are in use.
#include <immintrin.h>

#include "kernels.h"

namespace fptq {
namespace {

struct Isa {
  static constexpr const char* kName = "avx512vnni";
  static constexpr int kLanes = 16;
  static constexpr int kRows = 8;
  static constexpr int kTilesFromNibbles = 8;
  static constexpr int kAttentionTile = 8;
  static constexpr bool kWideIsSigned = false;
  using Int = __m512i;
  using Float = __m512;
  using Codes = __m512i;
  using Step = __m512i;

  static Codes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void load_nibbles(const uint8_t* p, Codes& low, Codes& high) {
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i both = _mm512_loadu_si512(p);
    low = _mm512_and_si512(both, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
  }
  static void store_bytes(uint8_t* p, Codes c) { _mm512_storeu_si512(p, c); }
  static Step load_step(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static Int splat_int(int32_t x) { return _mm512_set1_epi32(x); }
  static Int combine(Int a, Int b) { return _mm512_xor_si512(a, b); }
  static void hide(Codes& codes) { asm volatile("" : "+v"(codes)); }
  // Assembly: gcc 12 copies the accumulator before and after the intrinsic.
  template <bool kWide>
  static void dot(Int& sum, Codes codes, Step step) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(step));
  }

  static Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }
  static Float load_scales(const uint8_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
  static Float load_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  static void store_int8(int8_t* p, Float x) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
  }
  static Float splat(float x) { return _mm512_set1_ps(x); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float subtract(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float divide(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Float absolute(Float x) { return _mm512_abs_ps(x); }
  static Float round(Float x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Float where_less(Float a, Float b, Float yes, Float no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  static Float power_of_two(Float n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
  static float reduce_add(Float x) { return _mm512_reduce_add_ps(x); }
  static float reduce_max(Float x) { return _mm512_reduce_max_ps(x); }
};

#include "body.h"

}  // namespace

extern const Kernels kAvx512Vnni, kAvx512VnniZen;
constinit const Kernels kAvx512Vnni = kernels<Isa>();

// On AMD's Zen, bitwise instructions have ports beside those that multiply: taking nibbles apart in the loop costs
// nothing there. Intel's cores have two ports for all 512-bit instructions, so that the three more to every sixteen
// products are worth a pass of unpacking once it serves enough rows.
constinit const Kernels kAvx512VnniZen = [] {
  Kernels zen = kernels<Isa>();
  zen.name = "avx512vnni-zen";
  zen.tiles_from_nibbles = 1 << 30;
  return zen;
}();

}  // namespace fptq
