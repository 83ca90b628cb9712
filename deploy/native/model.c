#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "abi.h"
#include "cpu.h"
#include "error.h"
#include "plan.h"
#include "threads.h"
#include "workspace.h"

#define MAGIC 0x6861777174766d31u
#define MAX_THREADS 1024

static const hawq_plan *const plan = &hawq_library_plan;

struct hawq_model {
  uint64_t magic;
  hawq_model *next;              /* of all models */
  _Atomic(const void *) running; /* in which thread */
  hawq_pool *pool;
  void **storages;
  DLTensor *tensors;
  TVMFFIAny *arguments; /* of all calls, one after another */
  hawq_tensor *seen;    /* every tensor as an observer gets it */
  hawq_observer observer;
  void *observer_data;
};

/* -- all models: held while a thread forks, so that the child finds whole ones. ----------------------------------------------------- */

static pthread_mutex_t library = PTHREAD_MUTEX_INITIALIZER;
static hawq_model *models;
static _Thread_local char here; /* its address is the thread's */

/* Whether a model was free; it is this thread's then. */
static int take(hawq_model *model) {
  const void *nobody = NULL;
  if (atomic_compare_exchange_strong(&model->running, &nobody, &here)) return 0;
  return hawq_fail("the model is running in another thread");
}

static void give(hawq_model *model) { atomic_store(&model->running, NULL); }

static void before_fork(void) { pthread_mutex_lock(&library); }

static void after_fork(void) { pthread_mutex_unlock(&library); }

/* The thread that forked is the only one: what others ran, nobody runs now. */
static void in_child(void) {
  for (hawq_model *model = models; model != NULL; model = model->next) {
    const bool idle = atomic_load(&model->running) != &here;
    if (idle) give(model);
    hawq_pool_forked(model->pool, idle);
  }
  after_fork();
}

static int watching; /* the error of pthread_atfork */

static void watch_forks(void) { watching = pthread_atfork(before_fork, after_fork, in_child); }

static int enlist(hawq_model *model) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, watch_forks);
  if (watching != 0) return hawq_fail("the system does not watch for forks: error %d", watching);
  pthread_mutex_lock(&library);
  model->next = models;
  models = model;
  pthread_mutex_unlock(&library);
  return 0;
}

static void delist(const hawq_model *model) {
  pthread_mutex_lock(&library);
  hawq_model **at = &models;
  while (*at != NULL && *at != model) at = &(*at)->next;
  if (*at != NULL) *at = model->next; /* not there: it was never made whole */
  pthread_mutex_unlock(&library);
}

/* -- constants: kernels want them aligned, the blob of TVM's virtual machine does not align them. All models share one copy. ---- */

static struct {
  int users;
  uint8_t *memory;
  const void **data; /* by tensor; NULL where it is no constant */
} constants;

static uint64_t padded(uint64_t bytes) { return (bytes + HAWQ_ALIGNMENT - 1) / HAWQ_ALIGNMENT * HAWQ_ALIGNMENT; }

static int is_aligned(const void *data) { return (uintptr_t)data % HAWQ_ALIGNMENT == 0; }

static int copy_constants(void) {
  uint64_t total = 0;
  for (int i = 0; i < plan->tensor_count; ++i) {
    const hawq_plan_tensor *t = &plan->tensors[i];
    if (t->storage < 0 && !is_aligned(plan->blob + t->offset)) total += padded(t->bytes);
  }
  constants.memory = hawq_aligned(total);
  constants.data = calloc((size_t)plan->tensor_count, sizeof(*constants.data));
  if (constants.memory == NULL || constants.data == NULL) return hawq_fail("there is no memory for %llu bytes of weights", (unsigned long long)total);
  uint8_t *at = constants.memory;
  for (int i = 0; i < plan->tensor_count; ++i) {
    const hawq_plan_tensor *t = &plan->tensors[i];
    if (t->storage >= 0) continue;
    constants.data[i] = plan->blob + t->offset;
    if (is_aligned(constants.data[i])) continue;
    memcpy(at, constants.data[i], t->bytes);
    constants.data[i] = at;
    at += padded(t->bytes);
  }
  return 0;
}

static void free_constants(void) {
  free(constants.memory);
  free(constants.data);
  constants.memory = NULL;
  constants.data = NULL;
}

static int take_constants(void) {
  pthread_mutex_lock(&library);
  const int failed = constants.users == 0 ? copy_constants() : 0;
  if (failed) {
    free_constants();
  } else {
    ++constants.users;
  }
  pthread_mutex_unlock(&library);
  return failed;
}

static void give_constants(void) {
  pthread_mutex_lock(&library);
  if (--constants.users == 0) free_constants();
  pthread_mutex_unlock(&library);
}

/* -- a model --------------------------------------------------------------------------------------------------------------------- */

static int allocate(hawq_model *model) {
  int arguments = 0;
  for (int i = 0; i < plan->call_count; ++i) arguments += plan->calls[i].count;
  model->storages = calloc((size_t)plan->storage_count + 1, sizeof(*model->storages));
  model->tensors = calloc((size_t)plan->tensor_count + 1, sizeof(*model->tensors));
  model->seen = calloc((size_t)plan->tensor_count + 1, sizeof(*model->seen));
  model->arguments = calloc((size_t)arguments + 1, sizeof(*model->arguments));
  if (model->storages == NULL || model->tensors == NULL || model->seen == NULL || model->arguments == NULL) return hawq_fail("there is no memory for the model");
#ifdef HAWQ_SEPARATE_STORAGES /* so that a memory checker sees where each begins and ends */
  for (int i = 0; i < plan->storage_count; ++i) {
    model->storages[i] = hawq_aligned(plan->storages[i]);
    if (model->storages[i] == NULL) return hawq_fail("there is no memory for the model");
  }
#else
  uint64_t total = 0;
  for (int i = 0; i < plan->storage_count; ++i) total += padded(plan->storages[i]);
  uint8_t *at = model->storages[0] = hawq_aligned(total);
  if (at == NULL) return hawq_fail("there is no memory for %llu bytes of activations", (unsigned long long)total);
  for (int i = 0; i < plan->storage_count; ++i) {
    model->storages[i] = at;
    at += padded(plan->storages[i]);
  }
#endif
  return 0;
}

static void bind(hawq_model *model) {
  for (int i = 0; i < plan->tensor_count; ++i) {
    const hawq_plan_tensor *t = &plan->tensors[i];
    /* Kernels take void * and write no constant. */
    void *data = t->storage < 0 ? (void *)(uintptr_t)constants.data[i] : (uint8_t *)model->storages[t->storage] + t->offset;
    model->tensors[i] = (DLTensor){
        .data = data, .device = {kDLCPU, 0}, .ndim = t->rank, .dtype = t->type, .shape = (int64_t *)(uintptr_t)t->shape};
    model->seen[i] = (hawq_tensor){data, t->bytes, t->dtype, t->rank, t->shape};
  }
  TVMFFIAny *argument = model->arguments;
  for (int i = 0; i < plan->call_count; ++i) {
    for (int j = 0; j < plan->calls[i].count; ++j) {
      argument->type_index = kTVMFFIDLTensorPtr;
      argument++->v_ptr = &model->tensors[plan->calls[i].arguments[j]];
    }
  }
  for (int i = 0; i < plan->input_count; ++i) memset(hawq_model_input(model, i), 0, plan->tensors[plan->inputs[i]].bytes);
}

HAWQ_EXPORT int hawq_abi_version(void) { return HAWQ_ABI_VERSION; }

HAWQ_EXPORT const char *hawq_version(void) { return plan->version; }

HAWQ_EXPORT hawq_model *hawq_model_create(const hawq_options *options) {
  const int asked = options != NULL ? options->threads : 0;
  if (asked < 0 || asked > MAX_THREADS) {
    hawq_fail("%d threads were asked for, and 0 to %d can be", asked, MAX_THREADS);
    return NULL;
  }
  if (hawq_check_cpu(plan->features) != 0) return NULL;
  hawq_model *model = calloc(1, sizeof(*model));
  if (model == NULL) {
    hawq_fail("there is no memory for the model");
    return NULL;
  }
  if (take_constants() != 0) {
    free(model);
    return NULL;
  }
  model->magic = MAGIC;
  if (allocate(model) != 0) {
    hawq_model_destroy(model);
    return NULL;
  }
  bind(model);
  hawq_connect_kernels();
  model->pool = hawq_pool_create(asked ? asked : hawq_processors());
  if (model->pool == NULL) {
    hawq_fail("the system does not start %d threads", asked ? asked : hawq_processors());
    hawq_model_destroy(model);
    return NULL;
  }
  if (enlist(model) != 0) {
    hawq_model_destroy(model);
    return NULL;
  }
  return model;
}

static int check(const hawq_model *model) {
  if (model == NULL) return hawq_fail("the model is NULL");
  return model->magic == MAGIC ? 0 : hawq_fail("the pointer is no model, or of one that was destroyed");
}

HAWQ_EXPORT void hawq_model_destroy(hawq_model *model) {
  if (model == NULL || check(model) != 0) return;
  if (atomic_load(&model->running) != NULL) {
    hawq_fail("the model is running and was not destroyed");
    return;
  }
  model->magic = 0;
  delist(model);
  hawq_pool_destroy(model->pool);
#ifdef HAWQ_SEPARATE_STORAGES
  for (int i = 0; model->storages != NULL && i < plan->storage_count; ++i) free(model->storages[i]);
#else
  if (model->storages != NULL) free(model->storages[0]);
#endif
  free(model->storages);
  free(model->tensors);
  free(model->seen);
  free(model->arguments);
  free(model);
  give_constants();
}

HAWQ_EXPORT int hawq_model_inputs(const hawq_model *model) { return check(model) == 0 ? plan->input_count : -1; }

HAWQ_EXPORT int hawq_model_outputs(const hawq_model *model) { return check(model) == 0 ? plan->output_count : -1; }

HAWQ_EXPORT int hawq_model_threads(const hawq_model *model) { return check(model) == 0 ? hawq_pool_threads(model->pool) : -1; }

HAWQ_EXPORT const hawq_tensor *hawq_model_input_tensor(const hawq_model *model, int i) {
  if (check(model) != 0) return NULL;
  if (i >= 0 && i < plan->input_count) return &model->seen[plan->inputs[i]];
  hawq_fail("input %d was asked for, and the model has %d", i, plan->input_count);
  return NULL;
}

HAWQ_EXPORT const hawq_tensor *hawq_model_output_tensor(const hawq_model *model, int i) {
  if (check(model) != 0) return NULL;
  if (i >= 0 && i < plan->output_count) return &model->seen[plan->outputs[i]];
  hawq_fail("output %d was asked for, and the model has %d", i, plan->output_count);
  return NULL;
}

HAWQ_EXPORT void *hawq_model_input(hawq_model *model, int i) {
  return hawq_model_input_tensor(model, i) != NULL ? model->tensors[plan->inputs[i]].data : NULL;
}

HAWQ_EXPORT const void *hawq_model_output(const hawq_model *model, int i) {
  const hawq_tensor *tensor = hawq_model_output_tensor(model, i);
  return tensor != NULL ? tensor->data : NULL;
}

HAWQ_EXPORT int hawq_model_observe(hawq_model *model, hawq_observer observer, void *data) {
  if (check(model) != 0) return -1;
  if (take(model) != 0) return -1;
  model->observer = observer;
  model->observer_data = data;
  give(model);
  return 0;
}

static void show(const hawq_model *model, const hawq_plan_call *call) {
  hawq_tensor tensors[HAWQ_MAX_ARGUMENTS];
  int read = 0, written = call->count - call->written;
  for (int j = 0; j < written; ++j) {
    if (plan->tensors[call->arguments[j]].storage >= 0) tensors[read++] = model->seen[call->arguments[j]];
  }
  for (int j = 0; j < call->written; ++j) tensors[read + j] = model->seen[call->arguments[written + j]];
  model->observer(model->observer_data, call->name, tensors, read, tensors + read, call->written);
}

static int64_t integer(const void *data, DLDataType type, uint64_t i) {
  const int is_signed = type.code == kDLInt;
  switch (type.bits) {
    case 8: return is_signed ? ((const int8_t *)data)[i] : ((const uint8_t *)data)[i];
    case 16: return is_signed ? ((const int16_t *)data)[i] : ((const uint16_t *)data)[i];
    case 32: return is_signed ? (int64_t)((const int32_t *)data)[i] : (int64_t)((const uint32_t *)data)[i];
    default: return ((const int64_t *)data)[i];
  }
}

/* A position outside of its table, or a mask that is neither 0 nor 1: no kernel is run with one. */
static int check_inputs(const hawq_model *model) {
  for (int i = 0; i < plan->input_count; ++i) {
    const int64_t least = plan->ranges[2 * i], most = plan->ranges[2 * i + 1];
    if (least == INT64_MIN && most == INT64_MAX) continue;
    const hawq_plan_tensor *t = &plan->tensors[plan->inputs[i]];
    const void *data = model->tensors[plan->inputs[i]].data;
    const uint64_t count = t->bytes / (t->type.bits / 8U);
    for (uint64_t j = 0; j < count; ++j) {
      const int64_t value = integer(data, t->type, j);
      if (value < least || value > most) {
        return hawq_fail("input %d holds %lld, and the model takes %lld to %lld", i, (long long)value, (long long)least, (long long)most);
      }
    }
  }
  return 0;
}

static int run(const hawq_model *model) {
  const TVMFFIAny *arguments = model->arguments;
  for (int i = 0; i < plan->call_count; ++i) {
    const hawq_plan_call *call = &plan->calls[i];
    TVMFFIAny result = {0};
    if (call->kernel(NULL, arguments, call->count, &result) != 0) {
      char cause[HAWQ_ERROR_BYTES];
      memcpy(cause, hawq_error(), sizeof(cause));
      return hawq_fail("the kernel %.100s failed: %.300s", call->name, cause);
    }
    if (model->observer != NULL) show(model, call);
    arguments += call->count;
  }
  return 0;
}

HAWQ_EXPORT int hawq_model_run(hawq_model *model) {
  if (check(model) != 0) return -1;
  if (take(model) != 0) return -1;
  hawq_clear_error();
  hawq_pool *before = hawq_pool_enter(model->pool); /* an observer may run another model */
  const int failed = check_inputs(model) != 0 ? -1 : run(model);
  hawq_pool_enter(before);
  give(model);
  return failed;
}
