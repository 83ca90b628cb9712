// Arrays in NumPy's .npy files (format versions 1 to 3), little-endian and in C order.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "package.hpp"

namespace hawq {

// The elements that the elements of `spec` take, in bytes each.
size_t element_bytes(const Spec& spec);

size_t array_bytes(const Spec& spec);

// The bytes of the array in a file, checked against an input: type, shape, order, NaN, and the range of a sub-byte type.
// Throws Error naming what does not fit.
std::string read_array(const std::string& path, const Spec& spec);

// Writes an array of an output's type and shape by way of a temporary file. Throws Error when it cannot be written.
void write_array(const std::string& path, const Spec& spec, const std::string& bytes);

// Random values over the whole range of an input, the same for the same seed.
std::string random_array(const Spec& spec, uint64_t seed);

}  // namespace hawq
