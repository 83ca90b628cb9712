/* The C interface of a hawq_tvm library. It needs no Python and no TVM: link model.so, or open it with dlopen.
 *
 *     hawq_model *model = hawq_model_create(NULL);            NULL: see hawq_error()
 *     memcpy(hawq_model_input(model, 0), pixels, HAWQ_INPUT_0_BYTES);
 *     if (hawq_model_run(model) != 0) puts(hawq_error());
 *     const float *scores = hawq_model_output(model, 0);
 *     hawq_model_destroy(model);
 *
 * Any number of models may be created and run in different threads; one model serves one thread at a time, and a second
 * run at the same time is refused. After fork() parent and child go on with copies of all models, each its own. Two libraries
 * in one program: open each with dlopen and RTLD_LOCAL, their functions have the same names. */
#ifndef HAWQ_ABI_H
#define HAWQ_ABI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HAWQ_ABI_VERSION 1

typedef struct hawq_model hawq_model;

/* threads: how many take part in a run, the caller included; 0: as many as there are processors that the process may use. */
typedef struct {
  int threads;
} hawq_options;

/* A buffer: dense, row-major, in 8 bits where the type has fewer. dtype: "uint8", "int32", "float32", ... */
typedef struct {
  const void *data;
  size_t bytes;
  const char *dtype;
  int rank;
  const int64_t *shape;
} hawq_tensor;

/* Called after every kernel of a run with what it read (constants are left out) and what it wrote. The buffers are valid
 * during the call only, and the strings and shapes as long as the model. */
typedef void (*hawq_observer)(void *data, const char *kernel, const hawq_tensor *read, int read_count,
                              const hawq_tensor *written, int written_count);

/* HAWQ_ABI_VERSION of the library, and which hawq_tvm made it, for what. */
int hawq_abi_version(void);
const char *hawq_version(void);

/* Why the last call of this thread failed: one sentence, valid until this thread's next failure. */
const char *hawq_error(void);

/* A model with memory and threads of its own; options may be NULL. NULL on failure, for example on a processor that lacks
 * instructions of the library: nothing of it was executed then. */
hawq_model *hawq_model_create(const hawq_options *options);
void hawq_model_destroy(hawq_model *model);

int hawq_model_inputs(const hawq_model *model);
int hawq_model_outputs(const hawq_model *model);
int hawq_model_threads(const hawq_model *model);

/* The buffer of input or output i, fixed for the model's life and aligned to 64 bytes; NULL where there is none. Inputs keep
 * what was written to them, and are zero at first; outputs hold until the next run. */
void *hawq_model_input(hawq_model *model, int i);
const void *hawq_model_output(const hawq_model *model, int i);

/* The same buffers with their types and shapes, for programs that do not know them from model.h. */
const hawq_tensor *hawq_model_input_tensor(const hawq_model *model, int i);
const hawq_tensor *hawq_model_output_tensor(const hawq_model *model, int i);

/* One inference; 0 on success. Float inputs must not be NaN. */
int hawq_model_run(hawq_model *model);

/* Watch every kernel of later runs; NULL: no more. 0 on success. */
int hawq_model_observe(hawq_model *model, hawq_observer observer, void *data);

#ifdef __cplusplus
}
#endif

#endif
