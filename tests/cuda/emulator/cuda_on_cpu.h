// CUDA C++ for g++: the words and types that our kernels use, and the instructions of emulator.cpp.
//
// Kernels are compiled with -fsanitize=thread but linked without its library: every load and store calls emulator.cpp first, which
// so sees them without a change to the source. PTX statements are rewritten as calls by ptx.py.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#define __device__
#define __host__
#define __global__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
// emulate.py names the emulator's memory instead: dynamic shared memory, and behind it the static one.
#define __shared__
extern "C" unsigned char* const hawq_static;

#define HAWQ_VECTORS(T, NAME) \
  struct alignas(2 * sizeof(T)) NAME##2 { T x, y; }; \
  struct NAME##3 { T x, y, z; }; \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) NAME##4 { T x, y, z, w; }; \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; } \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
HAWQ_VECTORS(signed char, char)
HAWQ_VECTORS(unsigned char, uchar)
HAWQ_VECTORS(short, short)
HAWQ_VECTORS(unsigned short, ushort)
HAWQ_VECTORS(int, int)
HAWQ_VECTORS(unsigned, uint)
HAWQ_VECTORS(long, long)
HAWQ_VECTORS(unsigned long, ulong)
HAWQ_VECTORS(long long, longlong)
HAWQ_VECTORS(unsigned long long, ulonglong)
HAWQ_VECTORS(float, float)
HAWQ_VECTORS(double, double)

// Constant for a thread; the emulator changes them between threads.
extern "C" const uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace hawq_emulated {

void barrier(int line);
void ldmatrix_x4(unsigned (&r)[4], unsigned row);
// m, n, k; signs and bits of A and B; D and C are one.
void mma(int m, int k, int bits, bool a_signed, bool b_signed, const unsigned* a, const unsigned* b, int* c);
unsigned lanes();
uint64_t shuffle(unsigned mask, uint64_t value, int by, int width, bool down);
template <class T> inline T shuffle(unsigned mask, T value, int by, int width, bool down) {
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, by, width, down);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
void copy_async(unsigned to, size_t from, int bytes, int taken);
void commit_group();
void wait_group(int still_running);
unsigned shared_address(const void* p);

template <class A, class B> inline int dp4a(unsigned a, unsigned b, int c) {
  for (int i = 0; i < 4; ++i) c = int(unsigned(c) + unsigned(int(A(a >> 8 * i)) * int(B(b >> 8 * i))));
  return c;
}

template <class... A, size_t... I>
__attribute__((no_sanitize("thread"))) inline void invoke(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  static_assert((std::is_pointer_v<A> && ...), "only arrays are passed");
  kernel(static_cast<A>(args[I])...);
}
template <class... A> __attribute__((no_sanitize("thread"))) inline void invoke(void (*kernel)(A...), void** args) {
  invoke(kernel, args, std::index_sequence_for<A...>());
}

}  // namespace hawq_emulated

#define __syncthreads() ::hawq_emulated::barrier(__LINE__)

inline size_t __cvta_generic_to_shared(const void* p) { return ::hawq_emulated::shared_address(p); }
inline size_t __cvta_generic_to_global(const void* p) { return reinterpret_cast<size_t>(p); }

// Every lane of the warp: code in which only some are active is refused.
inline unsigned __activemask() { return hawq_emulated::lanes(); }
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) { return hawq_emulated::shuffle<T>(mask, value, int(by), width, true); }
template <class T> inline T __shfl_sync(unsigned mask, T value, int from, int width = 32) { return hawq_emulated::shuffle<T>(mask, value, from, width, false); }

inline int __dp4a(int a, int b, int c) { return hawq_emulated::dp4a<int8_t, int8_t>(unsigned(a), unsigned(b), c); }
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) { return unsigned(hawq_emulated::dp4a<uint8_t, uint8_t>(a, b, int(c))); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned found = 0;
  for (int i = 0; i < 4; ++i) found |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return found;
}
inline int __clzll(long long v) { return v == 0 ? 64 : __builtin_clzll((unsigned long long)v); }
inline int __mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline long long __mul64hi(long long a, long long b) { return (long long)((__int128(a) * b) >> 64); }

// Of one type, as CUDA's: two types would be converted silently.
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
