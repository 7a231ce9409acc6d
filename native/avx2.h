// What AVX2 and AVX-VNNI share: 8 lanes, 16 registers.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace fptq {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kRows = 2;  // eight accumulators, four vectors of codes, a step, constants
  static constexpr int kTilesFromNibbles = 2;
  static constexpr int kAttentionTile = 4;
  static constexpr bool kWideIsSigned = false;
  using Int = __m256i;
  using Float = __m256;
  using Codes = __m256i;
  using Step = __m256i;

  static Codes load_bytes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static void load_nibbles(const uint8_t* p, Codes& low, Codes& high) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i both = load_bytes(p);
    low = _mm256_and_si256(both, mask);
    high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
  }
  static void store_bytes(uint8_t* p, Codes c) { _mm256_storeu_si256((__m256i*)p, c); }
  static Step load_step(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  static Int splat_int(int32_t x) { return _mm256_set1_epi32(x); }
  static Int combine(Int a, Int b) { return _mm256_xor_si256(a, b); }
  static void hide(Codes& codes) { asm volatile("" : "+x"(codes)); }

  static Float to_float(Int x) { return _mm256_cvtepi32_ps(x); }
  static Float load_scales(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static Float load_int8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  static void store_int8(int8_t* p, Float x) {
    const __m256i codes = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
  }
  static Float splat(float x) { return _mm256_set1_ps(x); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float subtract(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float divide(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Float absolute(Float x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  static Float round(Float x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Float where_less(Float a, Float b, Float yes, Float no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  static Float power_of_two(Float n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static float reduce_add(Float x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  static float reduce_max(Float x) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
  }
};

}  // namespace
}  // namespace fptq
