// What ends the program: one sentence and an exit code.
#pragma once

#include <stdexcept>
#include <string>

namespace hawq {

// Exit codes are hawq-tvm's: 2 an option, an array or an output path is wrong, 3 a package is not readable or not for this machine.
constexpr int kUsage = 2, kPackage = 3;

class Error : public std::runtime_error {
 public:
  Error(int code, const std::string& sentence) : std::runtime_error(sentence), code(code) {}
  const int code;
};

}  // namespace hawq
