#include "host.hpp"

#include <dlfcn.h>
#include <sched.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>

#include "error.hpp"

namespace hawq {
namespace {

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

// The words of the "flags" (x86) and "Features" (Arm) lines of /proc/cpuinfo.
std::set<std::string> cpuinfo_flags() {
  std::ifstream info("/proc/cpuinfo");
  std::set<std::string> flags;
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
    std::istringstream words(line.substr(std::min(line.size(), line.find(':') + 1)));
    for (std::string word; words >> word;) flags.insert(word);
  }
  return flags;
}

void check_tiles(const Package& package, const std::string& where) {
  for (const std::string& flag : package.cpuinfo_flags) {
    if (flag.rfind("amx_", 0) != 0) continue;
    // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA); without it the first tile instruction kills the process.
#ifdef __x86_64__
    if (syscall(SYS_arch_prctl, 0x1023, 18) == 0) return;
#endif
    throw Error(kPackage, where + ": needs the tile registers of AMX; found " + std::strerror(errno) +
                              "; remedy: allow them (Linux 5.16 or newer, no seccomp filter on arch_prctl), or compile with --target host here");
  }
}

// A function of the NVIDIA driver. Throws Error when the driver lacks it.
template <typename... Arguments>
int driver_call(void* driver, const char* name, const std::string& where, Arguments... arguments) {
  auto function = reinterpret_cast<int (*)(Arguments...)>(dlsym(driver, name));
  if (function == nullptr) throw Error(kPackage, where + ": the NVIDIA driver is too old; expected one with " + name);
  return function(arguments...);
}

void check_gpu(const Package& package, const std::string& where) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (driver == nullptr) {
    throw Error(kPackage, where + ": needs a GPU, and no NVIDIA driver is installed here; expected libcuda.so.1; remedy: run it on a machine with an NVIDIA GPU");
  }
  int count = 0, version = 0, device = 0, major = 0, minor = 0;
  int code = driver_call(driver, "cuInit", where, 0u);
  if (code == 0) code = driver_call(driver, "cuDeviceGetCount", where, &count);
  if (code == 100 || (code == 0 && count == 0)) {  // CUDA_ERROR_NO_DEVICE
    throw Error(kPackage, where + ": needs a GPU, and the NVIDIA driver finds none; remedy: make one visible (nvidia-smi, CUDA_VISIBLE_DEVICES, docker run --gpus all)");
  }
  if (code == 0) code = driver_call(driver, "cuDriverGetVersion", where, &version);
  if (code == 0) code = driver_call(driver, "cuDeviceGet", where, &device, 0);
  if (code == 0) code = driver_call(driver, "cuDeviceGetAttribute", where, &major, 75, device);  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
  if (code == 0) code = driver_call(driver, "cuDeviceGetAttribute", where, &minor, 76, device);
  if (code != 0) throw Error(kPackage, where + ": the NVIDIA driver does not start; found CUDA error " + std::to_string(code) + "; remedy: see what nvidia-smi says");
  const std::string toolkit = package.toolkit.substr(0, package.toolkit.find('.'));
  if (std::to_string(version / 1000).size() < toolkit.size() || version / 1000 < std::atoi(toolkit.c_str())) {
    throw Error(kPackage, where + ": needs a newer NVIDIA driver; expected one for CUDA " + toolkit + ".0 or newer; found one for CUDA " + std::to_string(version / 1000));
  }
  for (const std::string& architecture : package.gpu_architectures) {  // "sm_86" runs on 8.6 and later of generation 8
    const int number = std::atoi(architecture.c_str() + std::min<size_t>(3, architecture.size()));
    if (number / 10 == major && number % 10 <= minor) return;
  }
  throw Error(kPackage, where + ": the GPU does not run the package's code; expected " + joined(package.gpu_architectures) + "; found sm_" + std::to_string(10 * major + minor));
}

}  // namespace

int available_cores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

void check_machine(const Package& package, const std::string& where) {
  utsname name{};
  uname(&name);
  if (package.architecture != name.machine) {
    throw Error(kPackage, where + ": was built for another architecture; expected " + name.machine + "; found " + package.architecture + "; remedy: compile it for this machine");
  }
  const std::set<std::string> have = cpuinfo_flags();
  std::vector<std::string> missing;
  for (const std::string& flag : package.cpuinfo_flags) {
    if (!have.count(flag)) missing.push_back(flag);
  }
  if (!missing.empty()) {
    throw Error(kPackage, where + ": needs CPU features that this machine lacks; found missing " + joined(missing) + "; remedy: compile with --target host on this machine");
  }
  check_tiles(package, where);
  if (package.on_gpu) check_gpu(package, where);
}

}  // namespace hawq
