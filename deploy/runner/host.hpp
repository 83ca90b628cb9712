// Whether this machine runs a package: architecture, instruction set extensions, the tile registers of AMX, the GPU.
#pragma once

#include "package.hpp"

namespace hawq {

// Throws Error naming what is missing; asks Linux for the tile registers when the package needs them.
void check_machine(const Package& package, const std::string& where);

// How many processors this process may use.
int available_cores();

}  // namespace hawq
