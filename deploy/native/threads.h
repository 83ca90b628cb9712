/* The threads of a model, and how TVM's kernels reach them and their scratch memory. */
#ifndef HAWQ_THREADS_H
#define HAWQ_THREADS_H

#include <stdbool.h>

typedef struct hawq_pool hawq_pool;

/* A pool of `threads`, the one that launches included; NULL on failure. */
hawq_pool *hawq_pool_create(int threads);
void hawq_pool_destroy(hawq_pool *pool);
int hawq_pool_threads(const hawq_pool *pool);

/* In the child of a fork, where the workers are gone: new ones are started when they are needed. idle: no kernel was running. */
void hawq_pool_forked(hawq_pool *pool, bool idle);

/* Kernels that this thread calls use `pool` until another is entered; NULL: none. Returns the one before. */
hawq_pool *hawq_pool_enter(hawq_pool *pool);

/* Give TVM's kernels our functions, where TVM itself has not given them its own. */
void hawq_connect_kernels(void);

#endif
