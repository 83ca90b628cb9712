#include "machine.hpp"

#include <dlfcn.h>
#include <signal.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/dtype.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "error.hpp"
#include "npy.hpp"

namespace hawq {
namespace {

namespace ffi = tvm::ffi;
constexpr int kPooled = 2;  // TVM's pooled allocator

// No signal ends the program while this lives: what it leaves on disk for a moment would stay.
class Undisturbed {
 public:
  Undisturbed() {
    sigset_t ending;
    sigemptyset(&ending);
    for (int number : {SIGINT, SIGTERM, SIGHUP}) sigaddset(&ending, number);
    pthread_sigmask(SIG_BLOCK, &ending, &before_);
  }
  ~Undisturbed() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

ffi::Module load_library(const std::string& bytes, const std::string& where) {
  const Undisturbed undisturbed;
  // A private copy of the bytes that were checked: the dynamic linker knows libraries by their path.
  const char* root = std::getenv("TMPDIR");
  std::string folder = std::string(root != nullptr && *root != '\0' ? root : "/tmp") + "/hawq_run_XXXXXX";
  if (mkdtemp(folder.data()) == nullptr) throw Error(kPackage, folder + ": cannot be made; remedy: set TMPDIR to a folder that can be written");
  const std::string path = folder + "/model.so";
  try {
    std::ofstream stream(path, std::ios::binary);
    stream.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    stream.close();
    if (!stream) throw Error(kPackage, path + ": cannot be written; remedy: set TMPDIR to a folder with space");
    ffi::Module module = ffi::Module::LoadFromFile(path);
    std::filesystem::remove_all(folder);
    return module;
  } catch (const ffi::Error& e) {
    std::filesystem::remove_all(folder);
    throw Error(kPackage, where + ": the library cannot be loaded; found " + e.message() + "; remedy: set TMPDIR to a folder from which programs may run, or compile again");
  }
}

void load_cuda(const std::string& where) {
  if (dlopen("libtvm_runtime_cuda.so", RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw Error(kPackage, where + ": TVM's CUDA runtime cannot be loaded; found " + dlerror() + "; remedy: install the CUDA toolkit 13's runtime, or set LD_LIBRARY_PATH to it");
  }
}

}  // namespace

Machine::Machine(const Package& package, int threads, const std::string& where) : package_(package) {
  // Read when the pool is made; without the second TVM binds this thread to processor 0, whatever is allowed.
  setenv("TVM_NUM_THREADS", std::to_string(threads).c_str(), 1);
  setenv("TVM_BIND_THREADS", "0", 0);
  if (package.on_gpu) load_cuda(where);
  module_ = load_library(package.library, where);
  try {
    ffi::Function::GetGlobalRequired("runtime.config_threadpool")(1, threads);
    executable_ = (*module_)->GetFunction("vm_load_executable", false).value()().cast<ffi::Module>();
    ffi::Function initialize = (*executable_)->GetFunction("vm_initialization", false).value();
    if (package.on_gpu) initialize(int(kDLCUDA), 0, kPooled, int(kDLCPU), 0, kPooled);
    else initialize(int(kDLCPU), 0, kPooled);
    main_ = (*executable_)->GetFunction("main", false).value();
    allocate_ = ffi::Function::GetGlobalRequired("runtime.TVMTensorAllocWithScope");
    write_ = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyFromBytes");
    read_ = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyToBytes");
  } catch (const std::exception& e) {
    throw Error(kPackage, where + ": TVM's virtual machine does not start; found " + std::string(e.what()).substr(0, 200));
  }
}

void Machine::set_inputs(const std::vector<std::string>& arrays) {
  const DLDevice device{package_.on_gpu ? kDLCUDA : kDLCPU, 0};
  inputs_.clear();
  arguments_.clear();
  for (size_t i = 0; i < arrays.size(); ++i) {
    const Spec& spec = package_.inputs[i];
    inputs_.push_back(allocate_(ffi::Shape(spec.shape), ffi::StringToDLDataType(spec.dtype), device, nullptr).cast<ffi::Tensor>());
    write_(inputs_.back(), static_cast<void*>(const_cast<char*>(arrays[i].data())), static_cast<int64_t>(arrays[i].size()));
  }
  for (const ffi::Tensor& input : inputs_) arguments_.emplace_back(input);
}

void Machine::run() { main_.CallPacked(arguments_.data(), static_cast<int32_t>(arguments_.size()), &result_); }

void Machine::run_to_the_end() {
  run();
  if (package_.on_gpu) output(0);  // the copy waits for the GPU
}

std::string Machine::output(size_t index) {
  const auto tensors = result_.cast<ffi::Array<ffi::Tensor>>();
  const Spec& spec = package_.outputs[index];
  bool fits = tensors.size() == package_.outputs.size();
  if (fits) {
    const ffi::Tensor tensor = tensors[static_cast<int64_t>(index)];
    const DLDataType wanted = ffi::StringToDLDataType(spec.dtype), found = tensor.dtype();
    fits = found.code == wanted.code && found.bits == wanted.bits && found.lanes == wanted.lanes && tensor.ndim() == static_cast<int>(spec.shape.size());
    for (size_t i = 0; fits && i < spec.shape.size(); ++i) fits = tensor.size(static_cast<int64_t>(i)) == spec.shape[i];
  }
  if (!fits) throw Error(kPackage, "the library gives other outputs than the manifest says; expected " + spec.name + " of " + spec.dtype + "; remedy: do not use the package; get it again from whom you trust");
  std::string bytes(array_bytes(spec), '\0');
  read_(tensors[static_cast<int64_t>(index)], static_cast<void*>(bytes.data()), static_cast<int64_t>(bytes.size()));
  return bytes;
}

}  // namespace hawq
