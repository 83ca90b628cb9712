/* Scratch memory of one thread, kept from one kernel to the next. */
#ifndef HAWQ_WORKSPACE_H
#define HAWQ_WORKSPACE_H

#include <stdbool.h>
#include <stddef.h>

#define HAWQ_WORKSPACE_BLOCKS 16

typedef struct {
  struct {
    void *data;
    size_t bytes;
    bool used;
  } blocks[HAWQ_WORKSPACE_BLOCKS];
} hawq_workspace;

void *hawq_aligned(size_t bytes); /* memory aligned for kernels, or NULL; for free() */
void *hawq_workspace_take(hawq_workspace *workspace, size_t bytes);
void hawq_workspace_give(hawq_workspace *workspace, void *data);
void hawq_workspace_forget(hawq_workspace *workspace); /* that blocks are in use: who used them is gone */
void hawq_workspace_clear(hawq_workspace *workspace);

#endif
