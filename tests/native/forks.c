/* forks HOW POOL_THREADS: models of a library, linked with this program, in the children of a process. A hang ends by SIGALRM.
 *
 * Every child runs a model that it got from its parent and one of its own, in several threads, forks again, and compares with the
 * integers that the first process computed; so does the parent afterwards. HOW: "before" a model ran at all, "after" it ran,
 * "during" a run in another thread, which the fork cuts off in the child, or "inside" a run, from an observer. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "arrays.h"

enum { KINDS = 4, THREADS = 3, DEPTH = 3, FORKS = 20 };

static uint8_t *expected[KINDS];
static size_t bytes;
static hawq_options options;
static hawq_model *model;
static atomic_int done, ran;
static int inside;

static void stop(const char *what) {
  fprintf(stderr, "forks: %s: %s\n", what, hawq_error());
  exit(1);
}

static hawq_model *make(void) {
  hawq_model *made = hawq_model_create(&options);
  if (made == NULL) stop("create");
  return made;
}

static void check(hawq_model *one) {
  uint8_t *room = malloc(bytes);
  for (unsigned kind = 0; kind < KINDS; ++kind) {
    fill(one, kind);
    if (hawq_model_run(one) != 0) stop("run");
    gather(one, room);
    if (memcmp(room, expected[kind], bytes) != 0) stop("other integers than before");
  }
  free(room);
}

static void *check_own(void *unused) {
  (void)unused;
  hawq_model *own = make();
  check(own);
  hawq_model_destroy(own);
  return NULL;
}

static void check_in_threads(void) {
  pthread_t ids[THREADS];
  for (int i = 0; i < THREADS; ++i) {
    if (pthread_create(&ids[i], NULL, check_own, NULL) != 0) stop("thread");
  }
  for (int i = 0; i < THREADS; ++i) pthread_join(ids[i], NULL);
}

static void wait_for(pid_t child) {
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || status != 0) stop("a child failed");
}

static void descend(int depth) {
  if (depth == 0) return;
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    check(model);
    check_in_threads();
    descend(depth - 1);
    check(model);
    hawq_model_destroy(model);
    exit(0);
  }
  wait_for(child);
}

static void *run_on(void *unused) {
  (void)unused;
  for (unsigned kind = 0; !atomic_load(&done); kind = (kind + 1) % KINDS) {
    fill(model, kind);
    if (hawq_model_run(model) != 0) stop("run");
    atomic_store(&ran, 1);
  }
  return NULL;
}

static void fork_inside(void *data, const char *kernel, const hawq_tensor *read, int reads, const hawq_tensor *written, int writes) {
  (void)data, (void)kernel, (void)read, (void)reads, (void)written, (void)writes;
  if (inside++ != 0) return;
  const pid_t child = fork();
  if (child != 0) {
    wait_for(child);
    return;
  }
  alarm(60);
  if (hawq_model_run(model) != -1) stop("a run within a run was not refused");
}

int main(int count, char **arguments) {
  if (count != 3) return 2;
  alarm(120);
  options.threads = atoi(arguments[2]);
  model = make();
  hawq_model *first = make(); /* computes what is expected, so that `model` has not run yet */
  bytes = gather(first, NULL);
  for (unsigned kind = 0; kind < KINDS; ++kind) {
    expected[kind] = malloc(bytes);
    fill(first, kind);
    if (hawq_model_run(first) != 0) stop("run");
    gather(first, expected[kind]);
  }
  hawq_model_destroy(first);
  if (strcmp(arguments[1], "after") == 0) check(model);
  if (strcmp(arguments[1], "during") == 0) {
    pthread_t id;
    if (pthread_create(&id, NULL, run_on, NULL) != 0) stop("thread");
    while (!atomic_load(&ran)) usleep(100);
    for (int i = 0; i < FORKS; ++i) descend(1);
    atomic_store(&done, 1);
    pthread_join(id, NULL);
  } else if (strcmp(arguments[1], "inside") == 0) {
    hawq_model_observe(model, fork_inside, NULL);
    check(model); /* in both processes: the child goes on with the run that it was born in */
    hawq_model_observe(model, NULL, NULL);
  } else {
    descend(DEPTH);
  }
  check(model);
  hawq_model_destroy(model);
  for (unsigned kind = 0; kind < KINDS; ++kind) free(expected[kind]);
  return 0;
}
