// SHA-256 (FIPS 180-4).
#pragma once

#include <string>
#include <string_view>

namespace hawq {

// The hash of the parts, one after another, as 64 hexadecimal digits.
std::string sha256(std::string_view first, std::string_view second = {});

}  // namespace hawq
