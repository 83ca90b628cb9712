#include "package.hpp"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/extra/json.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

#include "archive.hpp"
#include "error.hpp"
#include "sha256.hpp"

namespace hawq {
namespace {

namespace fs = std::filesystem;
namespace json = tvm::ffi::json;
using tvm::ffi::String;

const std::string kManifest = "manifest.json", kSignature = "manifest.json.minisig", kLibrary = "model.so";

[[noreturn]] void refuse(const std::string& where, const std::string& sentence) { throw Error(kPackage, where + ": " + sentence); }

[[noreturn]] void damaged(const std::string& where, const std::string& what) {
  refuse(where, "is damaged: " + what + "; remedy: compile or copy it again");
}

// A field of the manifest; `keys` leads through objects. Throws Error when it is missing or of another type.
template <typename T>
T field(const json::Value& object, std::initializer_list<const char*> keys, const std::string& where) {
  json::Value value = object;
  for (const char* key : keys) {
    auto map = value.try_cast<json::Object>();
    if (!map || !map->count(String(key))) refuse(where, std::string("has a manifest that another tool wrote; found no ") + key);
    value = (*map)[String(key)];
  }
  auto typed = value.try_cast<T>();
  if (!typed) refuse(where, std::string("has a manifest that another tool wrote; ") + *(keys.end() - 1) + " is of another type");
  return *typed;
}

std::vector<std::string> strings(const json::Array& array, const std::string& where) {
  std::vector<std::string> made;
  for (const json::Value& value : array) {
    auto text = value.try_cast<String>();
    if (!text) refuse(where, "has a manifest that another tool wrote; a list holds something else than text");
    made.emplace_back(*text);
  }
  return made;
}

// The manifest's line " "seal": "HASH"," is the hash of all other lines. Found in the bytes, before anything is parsed.
void check_seal(const std::string& data, const std::string& where) {
  const std::string key = "\n \"seal\": \"";
  const size_t at = data.find(key), digits = at + key.size();
  if (at == std::string::npos || data.size() < digits + 66 || data.compare(digits + 64, 2, "\",") != 0) damaged(where, "its manifest was changed");
  const std::string_view all = data;
  if (sha256(all.substr(0, at), all.substr(digits + 66)) != all.substr(digits, 64)) damaged(where, "its manifest was changed");
}

json::Value parse_manifest(const std::string& data, const std::string& where) {
  check_seal(data, where);
  String problem;
  const json::Value manifest = json::Parse(String(data), &problem);
  if (!problem.empty()) damaged(where, "its manifest is no JSON");
  const int64_t format = field<int64_t>(manifest, {"format"}, where);
  if (format != HAWQ_FORMAT) {
    refuse(where, "has another format version; expected " + std::to_string(HAWQ_FORMAT) + "; found " + std::to_string(format) +
                      "; remedy: use the hawq-run of the version that wrote it, or compile it again");
  }
  return manifest;
}

Files read_folder(const fs::path& folder, const std::string& where) {
  if (!fs::exists(folder / kManifest)) refuse(where, "is not a package; expected " + kManifest + "; found no such file");
  Files files;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    if (entry.is_symlink() || !entry.is_regular_file()) damaged(where, "a file is not a plain file: " + entry.path().filename().string());
    files[entry.path().filename().string()] = read_file(entry.path().string(), kPackage);
  }
  return files;
}

void check_files(const Files& files, const json::Value& manifest, const std::string& where) {
  std::map<std::string, std::string> hashes;
  for (const auto& [name, hash] : field<json::Object>(manifest, {"sha256"}, where)) {
    auto key = name.try_cast<String>(), value = hash.try_cast<String>();
    if (!key || !value) refuse(where, "has a manifest that another tool wrote; sha256 is of another type");
    hashes[*key] = *value;
  }
  for (const auto& [name, content] : files) {
    if (name != kManifest && name != kSignature && !hashes.count(name)) damaged(where, "a file does not belong: " + name);
  }
  if (!hashes.count(kLibrary)) damaged(where, "a file is missing: " + kLibrary);
  for (const auto& [name, hash] : hashes) {
    auto found = files.find(name);
    if (found == files.end()) damaged(where, "a file is missing: " + name);
    if (sha256(found->second) != hash) damaged(where, "a file does not match its checksum: " + name);
  }
}

// What a manifest may say of an input or output; the same as deploy/contents.py, which has a schema for it.
void check_spec(const Spec& spec, const std::string& where) {
  static const std::map<std::string, int> bytes = {{"bool", 1},   {"int8", 1},   {"uint8", 1}, {"int16", 2},   {"uint16", 2},  {"int32", 4},
                                                   {"uint32", 4}, {"int64", 8},  {"uint64", 8}, {"float16", 2}, {"float32", 4}, {"float64", 8}};
  const auto kind = bytes.find(spec.dtype);
  const bool narrow = (spec.dtype == "int8" && (spec.type == "int2" || spec.type == "int4")) || (spec.dtype == "uint8" && (spec.type == "uint2" || spec.type == "uint4"));
  if (spec.name.empty() || kind == bytes.end() || (spec.type != spec.dtype && !narrow)) refuse(where, "has a manifest that another tool wrote; a type makes no sense");
  double total = kind->second;  // exact enough for a limit
  for (int64_t size : spec.shape) total *= double(size);
  if (spec.shape.size() > 32 || total > double(int64_t(1) << 40)) refuse(where, "has a manifest that another tool wrote; an array would not fit into memory");
}

Spec spec(const json::Value& value, const std::string& where) {
  Spec made;
  made.name = field<String>(value, {"name"}, where);
  made.type = field<String>(value, {"type"}, where);
  made.dtype = field<String>(value, {"dtype"}, where);
  for (const json::Value& d : field<json::Array>(value, {"shape"}, where)) {
    auto size = d.try_cast<int64_t>();
    if (!size || *size < 0 || *size > (int64_t(1) << 40)) refuse(where, "has a manifest that another tool wrote; a dimension makes no sense");
    made.shape.push_back(*size);
  }
  auto object = field<json::Object>(value, {}, where);
  if (object.count(String("range"))) {
    const auto ends = field<json::Array>(value, {"range"}, where);
    const auto least = ends.size() == 2 ? ends[0].try_cast<int64_t>() : std::nullopt, most = ends.size() == 2 ? ends[1].try_cast<int64_t>() : std::nullopt;
    if (!least || !most || *least > *most) refuse(where, "has a manifest that another tool wrote; a range makes no sense");
    made.least = *least;
    made.most = *most;
  }
  if (object.count(String("quantization"))) {
    const json::Value q = object[String("quantization")];
    const auto scales = field<json::Array>(q, {"scale"}, where), zeros = field<json::Array>(q, {"zero_point"}, where);
    if (scales.size() == 1 && zeros.size() == 1) {
      const auto scale_value = scales[0].try_cast<double>();
      const auto zero_value = zeros[0].try_cast<int64_t>();
      if (!scale_value || !zero_value || !(*scale_value > 0) || !std::isfinite(*scale_value)) refuse(where, "has a manifest that another tool wrote; a quantization makes no sense");
      const double scale = *scale_value;
      const int64_t zero = *zero_value;
      made.low = scale * (double(field<int64_t>(q, {"qmin"}, where)) - double(zero));
      made.high = scale * (double(field<int64_t>(q, {"qmax"}, where)) - double(zero));
    }
  }
  check_spec(made, where);
  return made;
}

void check_version(const json::Value& manifest, const char* which, const std::string& linked, const std::string& where) {
  const std::string made = field<String>(manifest, {"producer", which}, where);
  if (made != linked) {
    refuse(where, std::string("was made with another version of TVM; expected ") + which + " " + linked + "; found " + made +
                      "; remedy: build hawq-run with that version, or compile the package again");
  }
}

}  // namespace

std::string read_file(const std::string& path, int code) {
  std::ifstream stream(path, std::ios::binary);
  std::ostringstream content;
  if (!stream || fs::is_directory(path)) throw Error(code, path + ": cannot be read; found " + (fs::exists(path) ? "a folder or no permission" : "no such file"));
  if (stream.peek() != std::ifstream::traits_type::eof()) content << stream.rdbuf();
  if (stream.bad() || content.bad()) throw Error(code, path + ": cannot be read");
  return std::move(content).str();
}

Package read_package(const std::string& path) {
  if (!fs::exists(path)) refuse(path, "does not exist; remedy: check the path");
  const bool folder = fs::is_directory(path);
  if (!folder && !fs::is_regular_file(path)) refuse(path, "is not a package; found a device or pipe");
  Files files;
  if (folder) {
    files = read_folder(path, path);
  } else {
    const std::string data = read_file(path, kPackage);
    if (data.size() < 64 || data.compare(0, 4, "PK\3\4") != 0 || data.compare(30, kManifest.size(), kManifest) != 0) refuse(path, "is not a package; expected what `hawq-tvm compile` or `hawq-tvm pack` wrote");
    files = unpack(data, path);
  }
  const json::Value manifest = parse_manifest(files[kManifest], path);
  check_files(files, manifest, path);
  check_version(manifest, "tvm", HAWQ_TVM_VERSION, path);
  check_version(manifest, "tvm_ffi", HAWQ_TVM_FFI_VERSION, path);
  Package package;
  package.name = field<String>(manifest, {"name"}, path);
  package.library = std::move(files[kLibrary]);
  package.architecture = field<String>(manifest, {"target", "architecture"}, path);
  package.cpuinfo_flags = strings(field<json::Array>(manifest, {"target", "cpuinfo_flags"}, path), path);
  package.on_gpu = field<String>(manifest, {"target", "kind"}, path) == "cuda";
  if (package.on_gpu) {
    package.gpu_architectures = strings(field<json::Array>(manifest, {"target", "architectures"}, path), path);
    package.toolkit = field<String>(manifest, {"producer", "cuda"}, path);
  }
  for (const json::Value& v : field<json::Array>(manifest, {"inputs"}, path)) package.inputs.push_back(spec(v, path));
  for (const json::Value& v : field<json::Array>(manifest, {"outputs"}, path)) package.outputs.push_back(spec(v, path));
  for (const auto* side : {&package.inputs, &package.outputs}) {
    std::set<std::string> names;
    for (const Spec& spec : *side) {
      if (!names.insert(spec.name).second) refuse(path, "has a manifest that another tool wrote; two inputs or outputs have the same name");
    }
  }
  return package;
}

}  // namespace hawq
