"""The device functions that CUDA kernels call: copies, matrix products and windows, spelled in PTX for every
architecture.

One source serves all architectures, so that one library can hold code for several: the preprocessor chooses by
__CUDA_ARCH__. What each function means is the `meaning` of its intrinsic in `mma_intrinsics.py` and
`dp4a_intrinsics.py`. Bytes of shared memory and registers of a fragment lie as the PTX ISA lays them out (section
"Matrix multiply-accumulate operation using mma instruction").
"""

from __future__ import annotations

SOURCE = r"""
namespace hawq {

// N bytes from global to shared memory, or N zeros; complete after cp.async.wait_group.
template <int N> __device__ __forceinline__ void copy(void* to, const void* from, int take) {
#if __CUDA_ARCH__ >= 800
  unsigned shared = (unsigned)__cvta_generic_to_shared(to);
  size_t global = __cvta_generic_to_global(from);
  int bytes = take ? N : 0;
  if constexpr (N == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 ::"r"(shared), "l"(global), "n"(N), "r"(bytes) : "memory");
#else
  if constexpr (N == 16) *(uint4*)to = take ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
  else if constexpr (N == 8) *(uint2*)to = take ? *(const uint2*)from : make_uint2(0, 0);
  else *(unsigned*)to = take ? *(const unsigned*)from : 0u;
#endif
}

// Four 8x8 matrices of 16 bits; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  unsigned shared = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared) : "memory");
}

#define HAWQ_MMA_4(NAME, SHAPE, TYPES) \
  __device__ __forceinline__ void NAME(int* c0, int* c1, const unsigned (&a)[4], unsigned b0, unsigned b1) { \
    asm volatile("mma.sync.aligned." SHAPE ".row.col.s32." TYPES ".s32 " \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+r"(c0[0]), "+r"(c0[1]), "+r"(c1[0]), "+r"(c1[1]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); \
  }
#define HAWQ_MMA_1(NAME, SHAPE, TYPES) \
  __device__ __forceinline__ void NAME##_8(int* c, unsigned a, unsigned b) { \
    asm volatile("mma.sync.aligned." SHAPE ".row.col.s32." TYPES ".s32 {%0, %1}, {%2}, {%3}, {%0, %1};" \
        : "+r"(c[0]), "+r"(c[1]) : "r"(a), "r"(b)); \
  } \
  __device__ __forceinline__ void NAME(int* c0, int* c1, const unsigned (&a)[4], unsigned b0, unsigned b1) { \
    NAME##_8(c0, a[0], b0); NAME##_8(c1, a[1], b0); NAME##_8(c0, a[2], b1); NAME##_8(c1, a[3], b1); \
  }
#if __CUDA_ARCH__ >= 800
HAWQ_MMA_4(mma_u8s8, "m16n8k32", "u8.s8")
HAWQ_MMA_4(mma_s8s8, "m16n8k32", "s8.s8")
#else
HAWQ_MMA_1(mma_u8s8, "m8n8k16", "u8.s8")
HAWQ_MMA_1(mma_s8s8, "m8n8k16", "s8.s8")
#endif
#if __CUDA_ARCH__ >= 900
#define HAWQ_NO_INT4
#elif __CUDA_ARCH__ >= 800
HAWQ_MMA_4(mma_u4s4, "m16n8k64", "u4.s4")
HAWQ_MMA_4(mma_s4s4, "m16n8k64", "s4.s4")
#else
HAWQ_MMA_1(mma_u4s4, "m8n8k32", "u4.s4")
HAWQ_MMA_1(mma_s4s4, "m8n8k32", "s4.s4")
#endif

// The low nibble of every byte as a byte.
__device__ __forceinline__ unsigned nibbles_u(unsigned bytes) { return bytes & 0x0F0F0F0Fu; }
// Likewise, sign-extended: with the sign flipped a nibble is v + 8, plus 0x78 it carries nowhere, and bit 7 flipped it
// is v.
__device__ __forceinline__ unsigned nibbles_s(unsigned bytes) {
  return (((bytes & 0x0F0F0F0Fu) ^ 0x08080808u) + 0x78787878u) ^ 0x80808080u;
}

#if defined(HAWQ_NO_INT4)
// Without 4-bit tensor cores: even and odd nibbles of both operands, as bytes.
#define HAWQ_MMA_OPENED(NAME, OPEN, MMA8) \
  __device__ __forceinline__ void NAME(int* c0, int* c1, const unsigned (&a)[4], unsigned b0, unsigned b1) { \
    unsigned even[4], odd[4]; \
    for (int i = 0; i < 4; ++i) { even[i] = OPEN(a[i]); odd[i] = OPEN(a[i] >> 4); } \
    MMA8(c0, c1, even, nibbles_s(b0), nibbles_s(b1)); \
    MMA8(c0, c1, odd, nibbles_s(b0 >> 4), nibbles_s(b1 >> 4)); \
  }
HAWQ_MMA_OPENED(mma_u4s4, nibbles_u, mma_u8s8)
HAWQ_MMA_OPENED(mma_s4s4, nibbles_s, mma_s8s8)
#endif

enum Form { U8S8, S8S8, U8S4, S8S4, U4S4, S4S4 };

template <Form F>
__device__ __forceinline__ void multiply(int* c0, int* c1, const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (F == U8S8 || F == U8S4) mma_u8s8(c0, c1, a, b0, b1);
  else if constexpr (F == S8S8 || F == S8S4) mma_s8s8(c0, c1, a, b0, b1);
  else if constexpr (F == U4S4) mma_u4s4(c0, c1, a, b0, b1);
  else mma_s4s4(c0, c1, a, b0, b1);
}

// c[MI][2][NI][2] += the products of one step of KI times 32 bytes of every row, see mma_intrinsics.py.
// a, b: where the data and weights of this lane's rows and columns begin; a row of data is cut into chunks of 16 bytes.
template <int MI, int NI, int KI, Form F>
__device__ __forceinline__ void step(int* c, const void* a, int chunk, const void* b, int fragment) {
  constexpr bool NIBBLES = F == U8S4 || F == S8S4;
  constexpr int WIDTH = NIBBLES ? 4 : 8;
  const int lane = threadIdx.x;
  const unsigned char* row = (const unsigned char*)a - (lane >> 2) * 16 + (lane & 15) * 16 + (lane >> 4) * chunk;
  const unsigned char* own = (const unsigned char*)b - (lane & 3) * (8 * KI * WIDTH) + lane * (KI * WIDTH);
#pragma unroll
  for (int k = 0; k < KI; k += 2) {
    unsigned data[2][MI][4];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int m = 0; m < MI; ++m) ldmatrix_x4(data[half][m], row + m * 256 + (k + half) * 2 * chunk);
#pragma unroll
    for (int n = 0; n < NI; ++n) {
      unsigned w[4];
      if constexpr (NIBBLES) {
        // 16 times the nibbles: no shift can lose a sign that way.
        uint2 packed = *(const uint2*)(own + n * fragment + k * WIDTH);
        w[0] = (packed.x << 4) & 0xF0F0F0F0u; w[1] = packed.x & 0xF0F0F0F0u;
        w[2] = (packed.y << 4) & 0xF0F0F0F0u; w[3] = packed.y & 0xF0F0F0F0u;
      } else {
        uint4 whole = *(const uint4*)(own + n * fragment + k * WIDTH);
        w[0] = whole.x; w[1] = whole.y; w[2] = whole.z; w[3] = whole.w;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int m = 0; m < MI; ++m)
          multiply<F>(c + ((m * 2) * NI + n) * 2, c + ((m * 2 + 1) * NI + n) * 2,
                      data[half][m], w[2 * half], w[2 * half + 1]);
    }
  }
}

// Byte c of up to four words, as word c.
template <int COUNT> __device__ __forceinline__ void gather(unsigned (&t)[4], const unsigned* words) {
  unsigned a = words[0], b = 0, c = 0, d = 0;
  if constexpr (COUNT > 1) b = words[1];
  if constexpr (COUNT > 2) c = words[2];
  if constexpr (COUNT > 3) d = words[3];
  unsigned ab = __byte_perm(a, b, 0x5140), cd = __byte_perm(c, d, 0x5140);
  t[0] = __byte_perm(ab, cd, 0x5410);
  t[1] = __byte_perm(ab, cd, 0x7632);
  ab = __byte_perm(a, b, 0x7362), cd = __byte_perm(c, d, 0x7362);
  t[2] = __byte_perm(ab, cd, 0x5410);
  t[3] = __byte_perm(ab, cd, 0x7632);
}

template <int FIRST, int COUNT, int N>
__device__ __forceinline__ void gather_from(unsigned (&t)[N][4], const unsigned* words) {
  if constexpr (4 * FIRST < COUNT) {
    gather<COUNT - 4 * FIRST>(t[FIRST], words + 4 * FIRST);
    gather_from<FIRST + 1, COUNT>(t, words);
  }
}

template <bool SIGNED> __device__ __forceinline__ int dot(unsigned data, unsigned weights, int sum) {
  if constexpr (SIGNED) asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(data), "r"(weights), "r"(sum));
  else asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(data), "r"(weights), "r"(sum));
  return sum;
}

// sums[PIXELS][4] += windows of TAPS words of a line, STRIDE words apart, with TAPS words of weights; every byte of a
// word is a channel.
template <int PIXELS, int TAPS, int STRIDE, bool SIGNED>
__device__ __forceinline__ void windows(int* sums, const void* line, const void* taps) {
  constexpr int COLUMNS = (PIXELS - 1) * STRIDE + TAPS, WORDS = (TAPS + 3) / 4;
  unsigned data[COLUMNS / 4 + 2][4], w[WORDS][4];
  gather_from<0, COLUMNS>(data, (const unsigned*)line);
  gather_from<0, TAPS>(w, (const unsigned*)taps);
#pragma unroll
  for (int p = 0; p < PIXELS; ++p)
#pragma unroll
    for (int k = 0; k < WORDS; ++k) {
      const int first = p * STRIDE + 4 * k, from = first % 4, count = TAPS - 4 * k < 4 ? TAPS - 4 * k : 4;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        // Weights that fit beside their data are moved to it: a weight's place is the same for many windows.
        const bool beside = from + count > 4;
        const unsigned own = data[first / 4][c];
        const unsigned bytes = beside ? __byte_perm(own, data[first / 4 + 1][c], 0x3210 + 0x1111 * from) : own;
        sums[4 * p + c] = dot<SIGNED>(bytes, beside ? w[k][c] : w[k][c] << 8 * from, sums[4 * p + c]);
      }
    }
}

}  // namespace hawq
"""
