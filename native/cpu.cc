#include "cpu.h"

#include <cstring>
#include <initializer_list>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fptq {

extern const Kernels kScalar;

#if defined(__x86_64__)

extern const Kernels kAvx512Vnni, kAvx512VnniZen, kAvxVnni, kAvxVnniEvex, kAvx2;

namespace {

struct Feature {
  const char* name;
  bool present;
};

std::string missing(std::initializer_list<Feature> features) {
  std::string names;
  for (const auto& feature : features)
    if (!feature.present) names += (names.empty() ? "" : ", ") + std::string(feature.name);
  return names;
}

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

// Zeros if the CPU has no such leaf.
Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

// Which registers the operating system saves, as XCR0 has it.
unsigned saved_registers() {
  if (!(cpuid(1).c >> 27 & 1)) return 0;  // no XGETBV
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
#if defined(__APPLE__)
  low |= 0xE0;  // macOS says so from their first use on only
#endif
  return low;
}

}  // namespace

std::vector<Target> targets() {
  // Not __builtin_cpu_supports: clang-cl doesn't link the library that it is in.
  const unsigned saved = saved_registers();
  const bool ymm = (saved & 0x06) == 0x06, zmm = ymm && (saved & 0xE0) == 0xE0;
  const Registers first = cpuid(1), seventh = cpuid(7);
  const auto feature = [](const char* name, bool registers, unsigned bits, int bit) {
    return Feature{name, registers && (bits >> bit & 1)};
  };
  const Feature fma = feature("FMA", ymm, first.c, 12), avx2 = feature("AVX2", ymm, seventh.b, 5);
  const Feature f = feature("AVX512F", zmm, seventh.b, 16), dq = feature("AVX512DQ", zmm, seventh.b, 17);
  const Feature bw = feature("AVX512BW", zmm, seventh.b, 30), vl = feature("AVX512VL", zmm, seventh.b, 31);
  const Feature vnni = feature("AVX512_VNNI", zmm, seventh.c, 11);
  const Feature avxvnni = feature("AVX_VNNI", ymm, cpuid(7, 1).a, 4);
  const auto lacks_avx512 = missing({avx2, fma, f, bw, vl, dq, vnni});
  std::vector<Target> all{{"avx512vnni", &kAvx512Vnni, lacks_avx512},
                          {"avx512vnni-zen", &kAvx512VnniZen, lacks_avx512},
                          {"avxvnni", &kAvxVnni, missing({avx2, fma, avxvnni})},
                          {"avxvnni-evex", &kAvxVnniEvex, missing({avx2, fma, vl, vnni})},
                          {"avx2", &kAvx2, missing({avx2, fma})},
                          {"scalar", &kScalar, ""}};
  if (cpuid(0).b == 0x68747541) std::swap(all[0], all[1]);  // "Auth" of AuthenticAMD
  for (auto& target : all)
    if (!target.missing.empty()) target.kernels = nullptr;
  return all;
}

std::string cpu_name() {
  unsigned words[12];
  for (unsigned i = 0; i < 3; ++i) {
    unsigned* w = words + 4 * i;
    if (!__get_cpuid(0x80000002 + i, w, w + 1, w + 2, w + 3)) return "";
  }
  char text[sizeof words + 1] = {};
  std::memcpy(text, words, sizeof words);
  std::string name(text);
  name.erase(0, name.find_first_not_of(' '));
  name.erase(name.find_last_not_of(' ') + 1);
  return name;
}

#elif defined(__aarch64__)

extern const Kernels kNeon;

std::vector<Target> targets() {
#if defined(__linux__)
  const bool dotprod = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof value;
  const bool dotprod = sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value;
#else
  const bool dotprod = false;
#endif
  return {{"neon", dotprod ? &kNeon : nullptr, dotprod ? "" : "dotprod (Armv8.2)"}, {"scalar", &kScalar, ""}};
}

std::string cpu_name() {
#if defined(__APPLE__)
  char text[256] = {};
  size_t size = sizeof text - 1;
  if (sysctlbyname("machdep.cpu.brand_string", text, &size, nullptr, 0) == 0) return text;
#endif
  return "aarch64";
}

#else

std::vector<Target> targets() { return {{"scalar", &kScalar, ""}}; }
std::string cpu_name() { return ""; }

#endif

}  // namespace fptq
