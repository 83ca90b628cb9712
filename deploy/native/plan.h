/* What the generated source of a library says to the runtime: its tensors, its kernels in order, and what they need. */
#ifndef HAWQ_PLAN_H
#define HAWQ_PLAN_H

#include <dlpack/dlpack.h>
#include <stddef.h>
#include <stdint.h>
#include <tvm/ffi/c_api.h>

#define HAWQ_ALIGNMENT 64 /* of every buffer that a kernel gets: what TVM's code expects */
#define HAWQ_MAX_ARGUMENTS 64 /* of a kernel; the generator refuses more */
#define HAWQ_EXPORT __attribute__((visibility("default")))

/* A tensor in the constants (an offset in the blob of TVM's virtual machine), or in a storage of the arena. */
typedef struct {
  uint64_t offset;
  uint64_t bytes;
  const int64_t *shape;
  const char *dtype;
  int32_t storage; /* -1: constant */
  int32_t rank;
  DLDataType type;
} hawq_plan_tensor;

typedef struct {
  const char *name;
  TVMFFISafeCallType kernel;
  const int32_t *arguments; /* tensors; those that are written come last */
  int32_t count, written;
} hawq_plan_call;

typedef struct {
  const char *version, *architecture;
  const char *const *features; /* LLVM's names of instruction set extensions; NULL at the end */
  const uint8_t *blob;
  const uint64_t *storages; /* bytes */
  const hawq_plan_tensor *tensors;
  const hawq_plan_call *calls;
  const int32_t *inputs, *outputs; /* tensors */
  const int64_t *ranges; /* least and greatest integer of every input; INT64_MIN and INT64_MAX where any will do */
  int32_t storage_count, tensor_count, call_count, input_count, output_count;
} hawq_plan;

extern const hawq_plan hawq_library_plan;

#endif
