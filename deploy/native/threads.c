#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "abi.h"
#include "cpu.h"
#include "error.h"
#include "plan.h"
#include "workspace.h"

/* TVM's interface to its thread pool (tvm/runtime/c_backend_api.h). */
typedef struct {
  void *sync_handle;
  int32_t num_task;
} group;
typedef int (*task)(int id, group *environment, void *closure);

/* A launch is divided into as many slots as threads take part; whoever claims a slot runs its tasks. Number n of the launches
 * is open to claims of a slot while its word is 2n and taken when it is 2n + 1, so that a thread that comes late finds none. */
typedef struct {
  _Alignas(HAWQ_ALIGNMENT) atomic_uint_fast64_t claim;
} slot;

typedef struct {
  hawq_pool *pool;
  int index;
  pthread_t thread;
  uint_fast64_t seen; /* the last launch before it was started */
  hawq_workspace workspace;
} worker;

struct hawq_pool {
  int threads, spins;
  bool lost; /* the workers, in a fork */
  worker *workers; /* the first is whoever launches */
  slot *slots;
  /* The launch: written before its slots are opened, read after one was claimed. */
  task lambda;
  void *closure;
  int tasks, used;
  /* Its progress. */
  _Alignas(HAWQ_ALIGNMENT) atomic_uint_fast64_t number;
  _Alignas(HAWQ_ALIGNMENT) atomic_int pending;
  atomic_int failed, stop, sleeping, waiting;
  pthread_mutex_t mutex;
  pthread_cond_t launched, finished;
  char error[HAWQ_ERROR_BYTES];
};

static _Thread_local hawq_pool *current;
static _Thread_local hawq_workspace *scratch;

static void rest(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  __asm__ volatile("isb"); /* yield takes no time on most cores */
#endif
}

static int run_tasks(task lambda, void *closure, int first, int step, int tasks) {
  atomic_int counter[HAWQ_ALIGNMENT / sizeof(atomic_int)] = {0}; /* what a barrier would count in; no kernel of ours has one */
  group environment = {counter, tasks};
  int failed = 0;
  for (int id = first; id < tasks; id += step) failed |= lambda(id, &environment, closure) != 0;
  return failed;
}

/* Run what is left of launch `number`, beginning with the slot that is this thread's by habit: its data may be in its cache. */
static void take_part(hawq_pool *pool, int index, uint_fast64_t number) {
  for (int i = 0; i < pool->threads; ++i) {
    slot *mine = &pool->slots[(index + i) % pool->threads];
    uint_fast64_t open = 2 * number;
    if (!atomic_compare_exchange_strong(&mine->claim, &open, 2 * number + 1)) continue;
    if (run_tasks(pool->lambda, pool->closure, (index + i) % pool->threads, pool->used, pool->tasks) && !atomic_exchange(&pool->failed, 1)) {
      memcpy(pool->error, hawq_error(), sizeof(pool->error));
    }
    if (atomic_fetch_sub(&pool->pending, 1) == 1 && atomic_load(&pool->waiting)) {
      pthread_mutex_lock(&pool->mutex);
      pthread_cond_signal(&pool->finished);
      pthread_mutex_unlock(&pool->mutex);
    }
  }
}

static uint_fast64_t next_launch(hawq_pool *pool, uint_fast64_t seen) {
  for (int i = 0; i < pool->spins; ++i) {
    const uint_fast64_t number = atomic_load(&pool->number);
    if (number != seen || atomic_load(&pool->stop)) return number;
    rest();
  }
  pthread_mutex_lock(&pool->mutex);
  atomic_fetch_add(&pool->sleeping, 1);
  while (atomic_load(&pool->number) == seen && !atomic_load(&pool->stop)) pthread_cond_wait(&pool->launched, &pool->mutex);
  atomic_fetch_sub(&pool->sleeping, 1);
  pthread_mutex_unlock(&pool->mutex);
  return atomic_load(&pool->number);
}

static void *work(void *argument) {
  worker *self = argument;
  hawq_pool *pool = self->pool;
  scratch = &self->workspace;
  for (uint_fast64_t seen = self->seen; !atomic_load(&pool->stop);) {
    const uint_fast64_t number = next_launch(pool, seen);
    if (number != seen) take_part(pool, self->index, number);
    seen = number;
  }
  return NULL;
}

static void wake(hawq_pool *pool) {
  if (!atomic_load(&pool->sleeping)) return;
  pthread_mutex_lock(&pool->mutex);
  pthread_cond_broadcast(&pool->launched);
  pthread_mutex_unlock(&pool->mutex);
}

static void await(hawq_pool *pool) {
  for (int i = 0; i < pool->spins; ++i) {
    if (!atomic_load(&pool->pending)) return;
    rest();
  }
  pthread_mutex_lock(&pool->mutex);
  atomic_store(&pool->waiting, 1);
  while (atomic_load(&pool->pending)) pthread_cond_wait(&pool->finished, &pool->mutex);
  atomic_store(&pool->waiting, 0);
  pthread_mutex_unlock(&pool->mutex);
}

static int start(hawq_pool *pool);

/* TVMBackendParallelLaunch: tasks 0: as many as there are threads. A parallel loop inside of one, or outside of a run, is run in turn. */
static int launch(task lambda, void *closure, int tasks) {
  hawq_pool *pool = current;
  const int threads = pool == NULL ? 1 : pool->threads;
  if (tasks <= 0) tasks = threads;
  if (threads == 1 || tasks == 1) return run_tasks(lambda, closure, 0, 1, tasks) ? -1 : 0;
  if (pool->lost && start(pool) != 0) return -1;
  pool->lambda = lambda;
  pool->closure = closure;
  pool->tasks = tasks;
  pool->used = tasks < threads ? tasks : threads;
  atomic_store(&pool->failed, 0);
  atomic_store(&pool->pending, pool->used);
  const uint_fast64_t number = atomic_load(&pool->number) + 1;
  for (int i = 0; i < pool->used; ++i) atomic_store(&pool->slots[i].claim, 2 * number);
  atomic_store(&pool->number, number);
  wake(pool);
  current = NULL;
  take_part(pool, 0, number);
  current = pool;
  await(pool);
  return atomic_load(&pool->failed) ? hawq_fail("%s", pool->error) : 0;
}

static void *take_workspace(int device_type, int device, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device, (void)code, (void)bits;
  return scratch != NULL ? hawq_workspace_take(scratch, (size_t)bytes) : hawq_aligned((size_t)bytes);
}

static int give_workspace(int device_type, int device, void *data) {
  (void)device_type, (void)device;
  if (scratch != NULL) {
    hawq_workspace_give(scratch, data);
  } else {
    free(data);
  }
  return 0;
}

/* LLVM's code has these pointers, each only where a kernel uses it; TVM fills them in when it loads the library. */
HAWQ_EXPORT __attribute__((weak)) int (*__TVMBackendParallelLaunch)(task, void *, int) = NULL;
HAWQ_EXPORT __attribute__((weak)) void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = NULL;
HAWQ_EXPORT __attribute__((weak)) int (*__TVMBackendFreeWorkspace)(int, int, void *) = NULL;

static void connect(void) {
  if (__TVMBackendParallelLaunch == NULL) __TVMBackendParallelLaunch = launch;
  if (__TVMBackendAllocWorkspace == NULL && __TVMBackendFreeWorkspace == NULL) {
    __TVMBackendAllocWorkspace = take_workspace;
    __TVMBackendFreeWorkspace = give_workspace;
  }
}

void hawq_connect_kernels(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, connect);
}

hawq_pool *hawq_pool_enter(hawq_pool *pool) {
  hawq_pool *before = current;
  current = pool;
  scratch = pool == NULL ? NULL : &pool->workers[0].workspace;
  return before;
}

int hawq_pool_threads(const hawq_pool *pool) { return pool->threads; }

static void stop(hawq_pool *pool, int started) {
  pthread_mutex_lock(&pool->mutex);
  atomic_store(&pool->stop, 1);
  pthread_cond_broadcast(&pool->launched);
  pthread_mutex_unlock(&pool->mutex);
  for (int i = 1; i < started; ++i) pthread_join(pool->workers[i].thread, NULL);
}

/* Start the workers; all of them or none. */
static int start(hawq_pool *pool) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the program's own threads' business */
  atomic_store(&pool->stop, 0);
  int started = 1;
  for (; started < pool->threads; ++started) {
    worker *w = &pool->workers[started];
    w->pool = pool;
    w->index = started;
    w->seen = atomic_load(&pool->number);
    if (pthread_create(&w->thread, NULL, work, w) != 0) break;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pool->lost = started < pool->threads;
  if (!pool->lost) return 0;
  stop(pool, started);
  return hawq_fail("the system does not start %d threads", pool->threads);
}

static void prepare(hawq_pool *pool) {
  pthread_mutex_init(&pool->mutex, NULL);
  pthread_cond_init(&pool->launched, NULL);
  pthread_cond_init(&pool->finished, NULL);
  atomic_store(&pool->sleeping, 0);
  atomic_store(&pool->waiting, 0);
}

hawq_pool *hawq_pool_create(int threads) {
  hawq_pool *pool = hawq_aligned(sizeof(*pool));
  if (pool == NULL) return NULL;
  memset(pool, 0, sizeof(*pool));
  pool->threads = threads;
  pool->lost = true;
  /* Some 50 microseconds, longer than from one kernel to the next; with fewer processors than threads waiting hinders the work. */
  pool->spins = threads <= hawq_processors() ? 2000 : 0;
  pool->workers = calloc((size_t)threads, sizeof(*pool->workers));
  pool->slots = hawq_aligned((size_t)threads * sizeof(*pool->slots));
  prepare(pool);
  if (pool->slots != NULL) memset(pool->slots, 0, (size_t)threads * sizeof(*pool->slots));
  if (pool->workers != NULL && pool->slots != NULL && start(pool) == 0) return pool;
  hawq_pool_destroy(pool);
  return NULL;
}

void hawq_pool_forked(hawq_pool *pool, bool idle) {
  pool->lost = true;
  prepare(pool); /* a worker may have held the mutex: nobody has it now */
  for (int i = idle ? 0 : 1; i < pool->threads; ++i) hawq_workspace_forget(&pool->workers[i].workspace);
}

void hawq_pool_destroy(hawq_pool *pool) {
  if (pool == NULL) return;
  if (!pool->lost) stop(pool, pool->threads);
  for (int i = 0; pool->workers != NULL && i < pool->threads; ++i) hawq_workspace_clear(&pool->workers[i].workspace);
  pthread_cond_destroy(&pool->finished);
  pthread_cond_destroy(&pool->launched);
  pthread_mutex_destroy(&pool->mutex);
  free(pool->slots);
  free(pool->workers);
  free(pool);
}
