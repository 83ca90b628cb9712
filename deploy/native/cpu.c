#define _GNU_SOURCE
#include "cpu.h"

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "error.h"

int hawq_processors(void) {
  /* More processors than a cpu_set_t has room for: the kernel says EINVAL until the set is large enough. */
  for (int capacity = CPU_SETSIZE; capacity <= 1 << 16; capacity *= 4) {
    cpu_set_t *set = CPU_ALLOC(capacity);
    if (set == NULL) return 1;
    const int failed = sched_getaffinity(0, CPU_ALLOC_SIZE(capacity), set);
    const int count = failed ? 0 : CPU_COUNT_S(CPU_ALLOC_SIZE(capacity), set);
    CPU_FREE(set);
    if (count > 0) return count;
  }
  return 1;
}

#if defined(__x86_64__)
#include <cpuid.h>

enum { EAX, EBX, ECX, EDX };

/* Registers that the operating system must save, as bits of XCR0. */
enum { NONE = 0, AVX = 0x6, AVX512 = 0xe6, TILES = 0x60000, APX = 0x80000 };

typedef struct {
  const char *name;
  uint32_t leaf, subleaf;
  int word, bit;
  uint64_t saved;
} feature;

/* Intel's Software Developer's Manual, volume 2, CPUID; AMD's Architecture Programmer's Manual, volume 3, appendix E. */
static const feature FEATURES[] = {
    {"sse3", 1, 0, ECX, 0, NONE},
    {"ssse3", 1, 0, ECX, 9, NONE},
    {"fma", 1, 0, ECX, 12, AVX},
    {"sse4.1", 1, 0, ECX, 19, NONE},
    {"sse4.2", 1, 0, ECX, 20, NONE},
    {"movbe", 1, 0, ECX, 22, NONE},
    {"popcnt", 1, 0, ECX, 23, NONE},
    {"avx", 1, 0, ECX, 28, AVX},
    {"f16c", 1, 0, ECX, 29, AVX},
    {"bmi", 7, 0, EBX, 3, NONE},
    {"avx2", 7, 0, EBX, 5, AVX},
    {"bmi2", 7, 0, EBX, 8, NONE},
    {"avx512f", 7, 0, EBX, 16, AVX512},
    {"avx512dq", 7, 0, EBX, 17, AVX512},
    {"avx512ifma", 7, 0, EBX, 21, AVX512},
    {"avx512cd", 7, 0, EBX, 28, AVX512},
    {"avx512bw", 7, 0, EBX, 30, AVX512},
    {"avx512vl", 7, 0, EBX, 31, AVX512},
    {"avx512vbmi", 7, 0, ECX, 1, AVX512},
    {"avx512vbmi2", 7, 0, ECX, 6, AVX512},
    {"gfni", 7, 0, ECX, 8, NONE},
    {"vaes", 7, 0, ECX, 9, AVX},
    {"vpclmulqdq", 7, 0, ECX, 10, AVX},
    {"avx512vnni", 7, 0, ECX, 11, AVX512},
    {"avx512bitalg", 7, 0, ECX, 12, AVX512},
    {"avx512vpopcntdq", 7, 0, ECX, 14, AVX512},
    {"amx-bf16", 7, 0, EDX, 22, TILES},
    {"avx512fp16", 7, 0, EDX, 23, AVX512},
    {"amx-tile", 7, 0, EDX, 24, TILES},
    {"amx-int8", 7, 0, EDX, 25, TILES},
    {"avxvnni", 7, 1, EAX, 4, AVX},
    {"avx512bf16", 7, 1, EAX, 5, AVX512},
    {"egpr", 7, 1, EDX, 21, APX},
    {"ndd", 7, 1, EDX, 21, APX},
    {"ccmp", 7, 1, EDX, 21, APX},
    {"nf", 7, 1, EDX, 21, APX},
    {"zu", 7, 1, EDX, 21, APX},
    {"ppx", 7, 1, EDX, 21, APX},
    {"push2pop2", 7, 1, EDX, 21, APX},
    {"lzcnt", 0x80000001, 0, ECX, 5, NONE},
    {"sse4a", 0x80000001, 0, ECX, 6, NONE},
    {"xop", 0x80000001, 0, ECX, 11, AVX},
    {"fma4", 0x80000001, 0, ECX, 16, AVX},
    {"tbm", 0x80000001, 0, ECX, 21, NONE},
};

static uint64_t saved_registers(void) {
  uint32_t words[4];
  if (!__get_cpuid_count(1, 0, &words[EAX], &words[EBX], &words[ECX], &words[EDX]) || !(words[ECX] >> 27 & 1)) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

static bool has(const char *name) {
  for (size_t i = 0; i < sizeof(FEATURES) / sizeof(FEATURES[0]); ++i) {
    const feature *f = &FEATURES[i];
    if (strcmp(f->name, name) != 0) continue;
    uint32_t words[4];
    if (!__get_cpuid_count(f->leaf, f->subleaf, &words[EAX], &words[EBX], &words[ECX], &words[EDX])) return false;
    return (words[f->word] >> f->bit & 1) && (saved_registers() & f->saved) == f->saved;
  }
  return false; /* what is not known cannot be promised */
}

static int permit(const char *const *features) {
  for (; *features != NULL; ++features) {
    if (strncmp(*features, "amx-", 4) != 0) continue;
    /* arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): without it the first tile instruction kills the process. */
    if (syscall(SYS_arch_prctl, 0x1023, 18) == 0) return 0;
    return hawq_fail("Linux does not grant the tile registers of AMX (it takes Linux 5.16 or newer and no seccomp filter on arch_prctl)");
  }
  return 0;
}

#elif defined(__aarch64__)
#include <sys/auxv.h>

typedef struct {
  const char *name;
  int word, bit;
} feature;

/* Linux, arch/arm64/include/uapi/asm/hwcap.h: bits of AT_HWCAP (0) and AT_HWCAP2 (1). */
static const feature FEATURES[] = {
    {"neon", 0, 1},      {"lse", 0, 8},   {"fullfp16", 0, 10}, {"rdm", 0, 12}, {"complxnum", 0, 14}, {"rcpc", 0, 15}, {"sha3", 0, 17},
    {"dotprod", 0, 20}, {"sve", 0, 22},  {"fp16fml", 0, 23},  {"sve2", 1, 1}, {"i8mm", 1, 13},      {"bf16", 1, 14},
    {"cssc", 1, 34},    {"sve2p1", 1, 36}, {"mops", 1, 43},     {"faminmax", 1, 50},
};

static bool has(const char *name) {
  for (size_t i = 0; i < sizeof(FEATURES) / sizeof(FEATURES[0]); ++i) {
    if (strcmp(FEATURES[i].name, name) == 0) return getauxval(FEATURES[i].word ? AT_HWCAP2 : AT_HWCAP) >> FEATURES[i].bit & 1;
  }
  return false; /* what is not known cannot be promised */
}

static int permit(const char *const *features) {
  (void)features;
  return 0;
}

#else
#error "hawq_tvm libraries run on x86-64 and AArch64"
#endif

int hawq_check_cpu(const char *const *features) {
  for (const char *const *f = features; *f != NULL; ++f) {
    if (!has(*f)) return hawq_fail("this library needs the instructions \"%s\", which this processor or its operating system lacks; compile the model for this machine", *f);
  }
  return permit(features);
}
