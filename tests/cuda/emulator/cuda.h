// What TVM includes: cuda_on_cpu.h, which comes first, has it all.
