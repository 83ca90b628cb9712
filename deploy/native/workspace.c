#define _GNU_SOURCE
#include "workspace.h"

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "plan.h"

#define HUGE_PAGE ((size_t)2 << 20)

/* What fills a huge page asks for some: weights and activations of a network are read from end to end in every run. */
void *hawq_aligned(size_t bytes) {
  if (bytes > SIZE_MAX - HUGE_PAGE) return NULL;
  const size_t alignment = bytes < HUGE_PAGE ? HAWQ_ALIGNMENT : HUGE_PAGE;
  const size_t whole = (bytes + alignment - 1) / alignment * alignment;
  void *data = aligned_alloc(alignment, whole ? whole : alignment);
  if (data != NULL && alignment == HUGE_PAGE) (void)madvise(data, whole, MADV_HUGEPAGE); /* a wish: without them it is as correct */
  return data;
}

/* The smallest free block that is large enough, else the room of a free one that is not. */
void *hawq_workspace_take(hawq_workspace *workspace, size_t bytes) {
  int best = -1, spare = -1;
  for (int i = 0; i < HAWQ_WORKSPACE_BLOCKS; ++i) {
    if (workspace->blocks[i].used) continue;
    if (workspace->blocks[i].data == NULL || workspace->blocks[i].bytes < bytes) {
      spare = i;
    } else if (best < 0 || workspace->blocks[i].bytes < workspace->blocks[best].bytes) {
      best = i;
    }
  }
  if (best < 0 && spare < 0) return hawq_aligned(bytes); /* all blocks are in use: a block of its own */
  if (best < 0) {
    best = spare;
    free(workspace->blocks[best].data);
    workspace->blocks[best].data = hawq_aligned(bytes);
    workspace->blocks[best].bytes = workspace->blocks[best].data == NULL ? 0 : bytes;
  }
  workspace->blocks[best].used = workspace->blocks[best].data != NULL;
  return workspace->blocks[best].data;
}

void hawq_workspace_give(hawq_workspace *workspace, void *data) {
  for (int i = 0; i < HAWQ_WORKSPACE_BLOCKS; ++i) {
    if (workspace->blocks[i].used && workspace->blocks[i].data == data) {
      workspace->blocks[i].used = false;
      return;
    }
  }
  free(data);
}

void hawq_workspace_forget(hawq_workspace *workspace) {
  for (int i = 0; i < HAWQ_WORKSPACE_BLOCKS; ++i) workspace->blocks[i].used = false;
}

void hawq_workspace_clear(hawq_workspace *workspace) {
  for (int i = 0; i < HAWQ_WORKSPACE_BLOCKS; ++i) {
    free(workspace->blocks[i].data);
    workspace->blocks[i].data = NULL;
    workspace->blocks[i].bytes = 0;
    workspace->blocks[i].used = false;
  }
}
