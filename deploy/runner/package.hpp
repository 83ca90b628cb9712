// A package, a folder or a single file: every hash, the versions and the machine are checked before any code of it is loaded.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hawq {

// An input or an output. type: in the model ("int4", say); dtype: of the arrays ("int8").
struct Spec {
  std::string name, type, dtype;
  std::vector<int64_t> shape;
  int64_t least = INT64_MIN, most = INT64_MAX;  // the integers that an input takes
  double low = -4, high = 4;  // what random inputs of a float type lie between: the quantized range
};

struct Package {
  std::string name, library, architecture;
  std::vector<std::string> cpuinfo_flags;
  bool on_gpu = false;
  std::vector<std::string> gpu_architectures;
  std::string toolkit;  // CUDA's version that compiled the kernels
  std::vector<Spec> inputs, outputs;
};

// Throws Error for a package that is missing, damaged, of another format or another version of TVM.
Package read_package(const std::string& path);

// A file's bytes. Throws Error with `code` when it cannot be read.
std::string read_file(const std::string& path, int code);

}  // namespace hawq
