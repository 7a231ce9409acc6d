// AVX-VNNI: AVX2 with vpdpbusd. The same instruction exists on CPUs with AVX-512 VNNI in another encoding; that twin is
// how these kernels are tested there.
#include "avx2.h"

namespace fptq {
namespace {

template <bool kVex>
struct Isa : Avx2 {
  static constexpr const char* kName = kVex ? "avxvnni" : "avxvnni-evex";

  template <bool kWide>
  static void dot(Int& sum, Codes codes, Step step) {
    if constexpr (kVex) {
      asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(step));
    } else {
      asm("%{evex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(step));
    }
  }
};

#include "body.h"

}  // namespace

extern const Kernels kAvxVnni, kAvxVnniEvex;
constinit const Kernels kAvxVnni = kernels<Isa<true>>();
constinit const Kernels kAvxVnniEvex = kernels<Isa<false>>();

}  // namespace fptq
