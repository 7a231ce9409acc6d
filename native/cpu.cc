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

bool has_avxvnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

}  // namespace

std::vector<Target> targets() {
  // These ask the operating system, too, whether it saves the registers.
  __builtin_cpu_init();
  const Feature avx2{"AVX2", __builtin_cpu_supports("avx2") != 0}, fma{"FMA", __builtin_cpu_supports("fma") != 0};
  const Feature f{"AVX512F", __builtin_cpu_supports("avx512f") != 0};
  const Feature bw{"AVX512BW", __builtin_cpu_supports("avx512bw") != 0};
  const Feature vl{"AVX512VL", __builtin_cpu_supports("avx512vl") != 0};
  const Feature dq{"AVX512DQ", __builtin_cpu_supports("avx512dq") != 0};
  const Feature vnni{"AVX512_VNNI", __builtin_cpu_supports("avx512vnni") != 0};
  const auto lacks_avx512 = missing({avx2, fma, f, bw, vl, dq, vnni});
  std::vector<Target> all{{"avx512vnni", &kAvx512Vnni, lacks_avx512},
                          {"avx512vnni-zen", &kAvx512VnniZen, lacks_avx512},
                          {"avxvnni", &kAvxVnni, missing({avx2, fma, {"AVX_VNNI", has_avxvnni()}})},
                          {"avxvnni-evex", &kAvxVnniEvex, missing({avx2, fma, vl, vnni})},
                          {"avx2", &kAvx2, missing({avx2, fma})},
                          {"scalar", &kScalar, ""}};
  if (__builtin_cpu_is("amd")) std::swap(all[0], all[1]);
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
