// A package's library in TVM's virtual machine.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <optional>
#include <string>
#include <vector>

#include "package.hpp"

namespace hawq {

class Machine {
 public:
  // Loads the library. threads: of TVM's thread pool. Throws Error when TVM refuses it.
  Machine(const Package& package, int threads, const std::string& where);

  // The arguments of every later run: the bytes of one array for each input, copied to where the library runs.
  void set_inputs(const std::vector<std::string>& arrays);

  // One inference; on a GPU its kernels may not have ended.
  void run();

  // One inference that has ended.
  void run_to_the_end();

  // The bytes of an output of the last run.
  std::string output(size_t index);

 private:
  const Package& package_;
  std::optional<tvm::ffi::Module> module_, executable_;
  tvm::ffi::Function main_, allocate_, write_, read_;
  std::vector<tvm::ffi::Tensor> inputs_;
  std::vector<tvm::ffi::AnyView> arguments_;
  tvm::ffi::Any result_;
};

}  // namespace hawq
