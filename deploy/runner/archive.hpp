// Single-file packages: the one way in which deploy/archive.py writes given files as a ZIP archive.
#pragma once

#include <map>
#include <string>

namespace hawq {

using Files = std::map<std::string, std::string>;

// The files of an archive by name. Throws Error unless it is, byte for byte, what deploy/archive.py writes for them.
Files unpack(const std::string& data, const std::string& where);

}  // namespace hawq
