// Which targets this build has, and which of them this CPU can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fptq {

struct Target {
  const char* name;
  const Kernels* kernels;  // null if the CPU can't run it
  std::string missing;     // what the CPU lacks
};

// Fastest first; the last one, scalar, runs everywhere.
std::vector<Target> targets();

// The CPU's name, or an empty string.
std::string cpu_name();

}  // namespace fptq
