#include "archive.hpp"

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "error.hpp"

namespace hawq {
namespace {

constexpr std::string_view kLocal{"PK\3\4", 4}, kCentral{"PK\1\2", 4}, kEnd{"PK\5\6", 4};
constexpr size_t kHeader = 30;  // bytes of a local header without its name

uint32_t crc32(std::string_view data) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> made{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
      made[i] = c;
    }
    return made;
  }();
  uint32_t c = ~0u;
  for (unsigned char byte : data) c = table[(c ^ byte) & 255] ^ (c >> 8);
  return ~c;
}

std::string little(uint64_t value, int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) text += static_cast<char>(value >> (8 * i) & 255);
  return text;
}

uint32_t number(std::string_view data, size_t offset, int bytes) {
  uint32_t value = 0;
  for (int i = 0; i < bytes; ++i) value |= uint32_t(static_cast<unsigned char>(data[offset + i])) << (8 * i);
  return value;
}

// The fields that a local header and the central directory share (APPNOTE 4.3.7): version 2.0, no flags, stored, 1 January 1980.
std::string common(std::string_view name, std::string_view data) {
  return little(20, 2) + little(0, 2) + little(0, 2) + little(0, 2) + little(33, 2) + little(crc32(data), 4) + little(data.size(), 4) +
         little(data.size(), 4) + little(name.size(), 2) + little(0, 2);
}

}  // namespace

Files unpack(const std::string& data, const std::string& where) {
  const Error damaged(kPackage, where + ": is damaged: its archive is not as `hawq-tvm pack` writes it; remedy: copy or pack it again");
  const std::string_view all = data;
  Files files;
  std::string directory;
  size_t at = 0;
  uint32_t count = 0;
  while (all.substr(at, 4) == kLocal) {
    if (all.size() - at < kHeader) throw damaged;
    const size_t size = number(all, at + 18, 4), length = number(all, at + 26, 2);
    if (all.size() - at - kHeader < length || all.size() - at - kHeader - length < size) throw damaged;
    const std::string_view name = all.substr(at + kHeader, length), content = all.substr(at + kHeader + length, size);
    const std::string header = common(name, content);
    if (all.substr(at + 4, kHeader - 4) != header || !files.emplace(name, content).second) throw damaged;
    // Made by Unix, no comment, a plain file of mode 0644, and where its local header is.
    directory += std::string(kCentral) + little(3 << 8 | 20, 2) + header + little(0, 6) + little(0100644u << 16, 4) + little(at, 4) + std::string(name);
    at += kHeader + length + size;
    ++count;
  }
  const std::string end = std::string(kEnd) + little(0, 4) + little(count, 2) + little(count, 2) + little(directory.size(), 4) + little(at, 4) + little(0, 2);
  if (all.substr(at) != directory + end) throw damaged;
  return files;
}

}  // namespace hawq
