/* load THREADS RUNS SHARED_RUNS POOL_THREADS: a library under load, linked with this program.
 *
 * Every thread creates a model of its own, runs it RUNS times on inputs that change from run to run, then runs one shared model
 * SHARED_RUNS times behind a lock, and at the end lets go of its own. Each run must give the integers that the first thread's
 * model gave for the same inputs. Prints the runs, and the kilobytes of memory after a tenth of the runs and at the end. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "arrays.h"
#include "model.h"

#define KINDS 8 /* of inputs */

static uint8_t *expected[KINDS];
static int threads, runs, shared_runs, pool_threads;
static hawq_model *shared;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_barrier_t barrier;
static long memory[2];

static void stop(const char *what) {
  fprintf(stderr, "load: %s: %s\n", what, hawq_error());
  exit(1);
}

static long kilobytes(void) {
  long pages = 0, all = 0;
  FILE *file = fopen("/proc/self/statm", "r");
  if (file == NULL || fscanf(file, "%ld %ld", &all, &pages) != 2) stop("statm");
  fclose(file);
  return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

static void check(hawq_model *model, unsigned kind, uint8_t *room) {
  fill(model, kind);
  if (hawq_model_run(model) != 0) stop("run");
  const size_t bytes = gather(model, room);
  if (memcmp(room, expected[kind], bytes) != 0) stop("other integers than before");
}

static hawq_model *make(void) {
  const hawq_options options = {pool_threads};
  hawq_model *model = hawq_model_create(&options);
  if (model == NULL) stop("create");
  return model;
}

static void *work(void *argument) {
  const unsigned index = *(unsigned *)argument;
  hawq_model *own = make();
  uint8_t *room = malloc(gather(own, NULL) + 1);
  for (int r = 0; r < runs; ++r) {
    check(own, (index + (unsigned)r) % KINDS, room);
    if (r == runs / 10) {
      pthread_barrier_wait(&barrier);
      if (index == 0) memory[0] = kilobytes();
    }
  }
  for (int r = 0; r < shared_runs; ++r) {
    pthread_mutex_lock(&lock);
    check(shared, (index + (unsigned)r) % KINDS, room);
    pthread_mutex_unlock(&lock);
  }
  pthread_barrier_wait(&barrier);
  if (index == 0) memory[1] = kilobytes();
  pthread_barrier_wait(&barrier);
  hawq_model_destroy(own);
  free(room);
  return NULL;
}

int main(int count, char **arguments) {
  if (count != 5) return 2;
  threads = atoi(arguments[1]), runs = atoi(arguments[2]), shared_runs = atoi(arguments[3]), pool_threads = atoi(arguments[4]);
  shared = make();
  for (unsigned k = 0; k < KINDS; ++k) {
    expected[k] = malloc(gather(shared, NULL) + 1);
    fill(shared, k);
    if (hawq_model_run(shared) != 0) stop("run");
    gather(shared, expected[k]);
  }
  pthread_barrier_init(&barrier, NULL, (unsigned)threads);
  pthread_t *ids = calloc((size_t)threads, sizeof(*ids));
  unsigned *numbers = calloc((size_t)threads, sizeof(*numbers));
  for (int i = 0; i < threads; ++i) {
    numbers[i] = (unsigned)i;
    if (pthread_create(&ids[i], NULL, work, &numbers[i]) != 0) stop("thread");
  }
  for (int i = 0; i < threads; ++i) pthread_join(ids[i], NULL);
  hawq_model_destroy(shared);
  for (unsigned k = 0; k < KINDS; ++k) free(expected[k]);
  pthread_barrier_destroy(&barrier);
  free(ids);
  free(numbers);
  printf("%ld %ld %ld\n", (long)threads * (runs + shared_runs), memory[0], memory[1]);
  return 0;
}
