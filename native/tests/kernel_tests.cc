// Every target of this build against plain loops, for builds that Python can't load: sanitizers, other architectures.
// tests/test_*kernels.py test the same kernels further; these lists are short. Prints one line a target, exits with 1
// on a fault. `kernel_tests NAME…` fails unless these targets could run.
#include <cstdio>
#include <string>
#include <vector>

#include "cpu.h"
#include "support.h"

using namespace fptq;

int main(int count, char** names) {
  std::vector<std::string> ran;
  for (const auto& target : targets()) {
    if (!target.kernels) {
      std::printf("%s: this CPU has no %s\n", target.name, target.missing.c_str());
      continue;
    }
    try {
      tests::test_decoders(*target.kernels, *targets().back().kernels);
      tests::test_operators(*target.kernels);
    } catch (const tests::Fault& fault) {
      std::printf("%s: WRONG: %s\n", target.name, fault.what.c_str());
      return 1;
    }
    std::printf("%s: right\n", target.name);
    ran.push_back(target.name);
  }
  for (int i = 1; i < count; ++i) {
    bool found = false;
    for (const auto& name : ran) found = found || name == names[i];
    if (!found) {
      std::printf("%s didn't run\n", names[i]);
      return 1;
    }
  }
  return 0;
}
