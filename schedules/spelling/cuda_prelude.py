"""CUDA source that goes before the kernels of every library: helper functions that TIR calls by name, and what they
mean in TIR.

Every function is `static __device__ __forceinline__`, guarded by __CUDA_ARCH__ where an architecture lacks its
instruction.
"""

from collections.abc import Callable
from typing import Any

from tvm import tirx

from . import cuda_device

INCLUDES = "#include <cstdint>\n"

# nvcc divides by a number that it does not know through the floating point unit; this is long division in integers.
DIVIDE = """
static __device__ __forceinline__ int64_t hawq_divide(int64_t dividend, int64_t divisor) {
  unsigned long long rest = dividend < 0 ? 0ull - (unsigned long long)dividend : (unsigned long long)dividend;
  unsigned long long by = divisor < 0 ? 0ull - (unsigned long long)divisor : (unsigned long long)divisor;
  unsigned long long quotient = 0;
  for (int bit = rest ? __clzll((long long)by) - __clzll((long long)rest) : -1; bit >= 0; --bit) {
    if (rest >= by << bit) {
      rest -= by << bit;
      quotient |= 1ull << bit;
    }
  }
  return (dividend < 0) != (divisor < 0) ? (int64_t)(0ull - quotient) : (int64_t)quotient;
}
"""


# TVM writes a vector of 8 or 16 equal bytes (zeros around a pooled image) as a call of these with as many arguments.
def _word(w: int) -> str:
    return f"hawq_word({', '.join(f'b{4 * w + i}' for i in range(4))})"


BYTES = """
template <typename T>
static __device__ __forceinline__ unsigned hawq_word(T a, T b, T c, T d) {
  return (unsigned)(uint8_t)a | (unsigned)(uint8_t)b << 8 | (unsigned)(uint8_t)c << 16 | (unsigned)(uint8_t)d << 24;
}
""" + "".join(
    f"template <typename T>\nstatic __device__ __forceinline__ {kind}{words}"
    f" make_{kind}{words}({', '.join(f'T b{i}' for i in range(4 * words))}) {{\n"
    f"  return make_{kind}{words}({', '.join(_word(w) for w in range(words))});\n}}\n"
    for kind in ("int", "uint")
    for words in (2, 4)
)

PRELUDE = INCLUDES + DIVIDE + BYTES + cuda_device.SOURCE

# The same functions in TIR, for whoever runs a kernel elsewhere.
MEANINGS: dict[str, Callable[..., Any]] = {"hawq_divide": tirx.truncdiv}
