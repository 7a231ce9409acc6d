// AVX2 with FMA, for CPUs without VNNI.
#include "avx2.h"

namespace fptq {
namespace {

struct Isa : Avx2 {
  static constexpr const char* kName = "avx2";

  template <bool kWide>
  static void dot(Int& sum, Codes codes, Step step) {
    if constexpr (kWide) {
      // vpmaddubsw would saturate: 2·255·127 > 2^15. Even and odd bytes by themselves, as 16-bit numbers.
      const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)),
                                             _mm256_srai_epi16(_mm256_slli_epi16(step, 8), 8));
      const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(step, 8));
      sum = _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
    } else {
      // At most 2·15·128 = 3,840 in 16 bits.
      const __m256i pairs = _mm256_maddubs_epi16(codes, step);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  }
};

#include "body.h"

}  // namespace

extern const Kernels kAvx2;
constinit const Kernels kAvx2 = kernels<Isa>();

}  // namespace fptq
