#include "npy.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <random>

#include "error.hpp"

namespace hawq {
namespace {

struct Kind {
  const char* descr;
  size_t bytes;
};

const Kind& kind_of(const Spec& spec) {
  static const std::map<std::string, Kind> kinds = {
      {"bool", {"|b1", 1}},    {"int8", {"|i1", 1}},    {"uint8", {"|u1", 1}},   {"int16", {"<i2", 2}},   {"uint16", {"<u2", 2}},  {"int32", {"<i4", 4}},
      {"uint32", {"<u4", 4}},  {"int64", {"<i8", 8}},   {"uint64", {"<u8", 8}},  {"float16", {"<f2", 2}}, {"float32", {"<f4", 4}}, {"float64", {"<f8", 8}}};
  auto found = kinds.find(spec.dtype);
  if (found == kinds.end()) throw Error(kPackage, spec.name + ": has a type that .npy files lack: " + spec.dtype);
  return found->second;
}

std::string shape_text(const Spec& spec) {
  std::string text = "(";
  for (size_t i = 0; i < spec.shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(spec.shape[i]);
  return text + (spec.shape.size() == 1 ? ",)" : ")");
}

// The value of a key of the header, which NumPy writes as a Python dictionary: {'descr': '<f4', 'fortran_order': False, 'shape': (1, 3), }
std::string header_value(const std::string& header, const std::string& key) {
  const size_t at = header.find("'" + key + "':");
  if (at == std::string::npos) return "";
  size_t begin = header.find_first_not_of(' ', at + key.size() + 3);
  if (begin == std::string::npos) return "";
  const char closing = header[begin] == '(' ? ')' : header[begin] == '\'' ? '\'' : ',';
  const size_t end = header.find(closing, begin + 1);
  if (end == std::string::npos) return "";
  return header.substr(begin, end - begin + (closing == ',' ? 0 : 1));
}

// Text of a file as an error may print it.
std::string printable(std::string text) {
  for (char& c : text) {
    if (c < ' ' || c > '~') c = '?';
  }
  return text.substr(0, 80);
}

// Whether a sub-byte type is meant ("int4" in int8), and its range.
bool narrow_range(const Spec& spec, int& low, int& high) {
  if (spec.type == spec.dtype) return false;
  const bool is_unsigned = spec.type.rfind("uint", 0) == 0;
  if (!is_unsigned && spec.type.rfind("int", 0) != 0) return false;
  const int bits = std::atoi(spec.type.c_str() + (is_unsigned ? 4 : 3));
  if (bits < 1 || bits > 7) return false;
  low = is_unsigned ? 0 : -(1 << (bits - 1));
  high = is_unsigned ? (1 << bits) - 1 : (1 << (bits - 1)) - 1;
  return true;
}

template <typename T>
T element(const std::string& bytes, size_t index) {
  T value;
  std::memcpy(&value, bytes.data() + index * sizeof(T), sizeof(T));
  return value;
}

bool has_nan(const std::string& bytes, const Spec& spec) {
  const size_t count = bytes.size() / element_bytes(spec);
  for (size_t i = 0; i < count; ++i) {
    if (spec.dtype == "float32" && std::isnan(element<float>(bytes, i))) return true;
    if (spec.dtype == "float64" && std::isnan(element<double>(bytes, i))) return true;
    if (spec.dtype == "float16" && (element<uint16_t>(bytes, i) & 0x7FFF) > 0x7C00) return true;
  }
  return false;
}

int64_t integer(const std::string& bytes, const Spec& spec, size_t i) {
  if (spec.dtype == "int8") return element<int8_t>(bytes, i);
  if (spec.dtype == "int16") return element<int16_t>(bytes, i);
  if (spec.dtype == "uint16") return element<uint16_t>(bytes, i);
  if (spec.dtype == "int32") return element<int32_t>(bytes, i);
  if (spec.dtype == "uint32") return element<uint32_t>(bytes, i);
  return spec.dtype == "int64" ? element<int64_t>(bytes, i) : element<uint8_t>(bytes, i);
}

bool is_ranged(const Spec& spec) { return spec.least != INT64_MIN || spec.most != INT64_MAX; }

void check_values(const std::string& bytes, const Spec& spec, const std::string& where) {
  if (spec.dtype.rfind("float", 0) == 0 && has_nan(bytes, spec)) throw Error(kUsage, where + "contains NaN, which no integer stands for; remedy: clean the input");
  for (size_t i = 0; is_ranged(spec) && i < bytes.size() / element_bytes(spec); ++i) {
    const int64_t value = integer(bytes, spec, i);
    if (value >= spec.least && value <= spec.most) continue;
    throw Error(kUsage, where + "leaves the range that the model takes; expected " + std::to_string(spec.least) + ".." + std::to_string(spec.most) + "; found " + std::to_string(value));
  }
  int low, high;
  const bool narrow = narrow_range(spec, low, high);
  for (size_t i = 0; i < bytes.size() && (narrow || spec.dtype == "bool"); ++i) {
    const int value = spec.dtype == "int8" ? static_cast<signed char>(bytes[i]) : static_cast<unsigned char>(bytes[i]);
    if (spec.dtype == "bool" && value > 1) throw Error(kUsage, where + "is damaged: a truth value is neither 0 nor 1");
    if (narrow && (value < low || value > high)) {
      throw Error(kUsage, where + "leaves the range of " + spec.type + "; expected " + std::to_string(low) + ".." + std::to_string(high) + "; found " + std::to_string(value));
    }
  }
}

}  // namespace

size_t element_bytes(const Spec& spec) { return kind_of(spec).bytes; }

size_t array_bytes(const Spec& spec) {
  size_t total = element_bytes(spec);
  for (int64_t size : spec.shape) total *= static_cast<size_t>(size);
  return total;
}

std::string read_array(const std::string& path, const Spec& spec) {
  const std::string where = path + " (input " + spec.name + "): ";
  const std::string data = read_file(path, kUsage);
  const bool numpy = data.size() >= 12 && data.compare(0, 6, "\x93NUMPY") == 0;
  const int version = numpy ? static_cast<unsigned char>(data[6]) : 0;
  if (version < 1 || version > 3) throw Error(kUsage, where + "cannot be read; expected an .npy file (numpy.save)" + (data.compare(0, 2, "PK") == 0 ? "; found an .npz file" : ""));
  const auto byte = [&](size_t i) { return static_cast<size_t>(static_cast<unsigned char>(data[i])); };
  const size_t start = version == 1 ? 10 : 12;
  const size_t length = version == 1 ? byte(8) | byte(9) << 8 : byte(8) | byte(9) << 8 | byte(10) << 16 | byte(11) << 24;
  if (length > data.size() - start) throw Error(kUsage, where + "is damaged: its header is cut off");
  const std::string header = data.substr(start, length);
  const std::string descr = header_value(header, "descr"), order = header_value(header, "fortran_order"), shape = header_value(header, "shape");
  if (shape != shape_text(spec)) throw Error(kUsage, where + "has another shape; expected " + shape_text(spec) + "; found " + (shape.empty() ? "none" : printable(shape)));
  const std::string wanted = std::string("'") + kind_of(spec).descr + "'";
  if (descr != wanted) throw Error(kUsage, where + "has another type; expected " + spec.dtype + " " + wanted + "; found " + printable(descr) + "; remedy: save array.astype('" + spec.dtype + "')");
  if (order != "False") throw Error(kUsage, where + "is in Fortran order; remedy: save numpy.ascontiguousarray(array)");
  const std::string bytes = data.substr(start + length);
  if (bytes.size() != array_bytes(spec)) {
    throw Error(kUsage, where + "is damaged; expected " + std::to_string(array_bytes(spec)) + " bytes of elements; found " + std::to_string(bytes.size()));
  }
  check_values(bytes, spec, where);
  return bytes;
}

void write_array(const std::string& path, const Spec& spec, const std::string& bytes) {
  std::string header = std::string("{'descr': '") + kind_of(spec).descr + "', 'fortran_order': False, 'shape': " + shape_text(spec) + ", }";
  while ((10 + header.size() + 1) % 64 != 0) header += ' ';
  header += '\n';
  std::string data("\x93NUMPY\1\0", 8);
  data += static_cast<char>(header.size() & 255);
  data += static_cast<char>(header.size() >> 8);
  data += header + bytes;
  std::error_code ignored;
  const std::filesystem::path real = std::filesystem::weakly_canonical(path, ignored);  // a link stays, and leads to the new array
  const std::filesystem::path target = real.empty() ? std::filesystem::path(path) : real;
  std::string temporary = (target.parent_path() / ("." + target.filename().string().substr(0, 100) + ".XXXXXX")).string();
  const int descriptor = mkstemp(temporary.data());  // a new file: no link is followed
  bool written = descriptor >= 0;
  for (size_t at = 0; written && at < data.size();) {
    const ssize_t count = write(descriptor, data.data() + at, data.size() - at);
    if (count > 0) at += static_cast<size_t>(count);
    else written = errno == EINTR;
  }
  const mode_t mask = umask(0);
  umask(mask);
  struct stat before {};
  const mode_t mode = stat(target.c_str(), &before) == 0 ? before.st_mode & 0777 : 0666 & ~mask;
  written = written && fchmod(descriptor, mode) == 0 && fsync(descriptor) == 0;
  if (descriptor >= 0 && close(descriptor) != 0) written = false;
  if (!written || std::filesystem::is_directory(target) || std::rename(temporary.c_str(), target.c_str()) != 0) {
    if (descriptor >= 0) std::remove(temporary.c_str());
    throw Error(kUsage, path + ": cannot be written; remedy: check the path and its permissions");
  }
}

std::string random_array(const Spec& spec, uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::string bytes(array_bytes(spec), '\0');
  int low, high;
  const bool narrow = narrow_range(spec, low, high);
  const size_t size = element_bytes(spec), count = bytes.size() / size;
  for (size_t i = 0; i < count; ++i) {
    char* place = bytes.data() + i * size;
    const uint64_t bits = engine();
    const double real = spec.low + (spec.high - spec.low) * double(bits >> 11) * 0x1p-53;
    const float single = static_cast<float>(real);
    const uint16_t half = static_cast<uint16_t>(bits & 0x83FF) | 0x3C00;  // between 1 and 2 in size
    if (spec.dtype == "float32") std::memcpy(place, &single, 4);
    else if (spec.dtype == "float64") std::memcpy(place, &real, 8);
    else if (spec.dtype == "float16") std::memcpy(place, &half, 2);
    else if (spec.dtype == "bool") *place = static_cast<char>(bits & 1);
    else if (is_ranged(spec)) {  // little endian, as the array is
      const uint64_t value = static_cast<uint64_t>(spec.least) + bits % (static_cast<uint64_t>(spec.most) - static_cast<uint64_t>(spec.least) + 1);
      std::memcpy(place, &value, size);
    } else if (narrow) *place = static_cast<char>(low + static_cast<int>(bits % static_cast<uint64_t>(high - low + 1)));
    else std::memcpy(place, &bits, size);
  }
  return bytes;
}

}  // namespace hawq
