#include "workspace.h"

#include <stdint.h>
#include <stdlib.h>

#include "plan.h"

void *hawq_aligned(size_t bytes) {
  if (bytes > SIZE_MAX - HAWQ_ALIGNMENT) return NULL;
  const size_t whole = (bytes + HAWQ_ALIGNMENT - 1) / HAWQ_ALIGNMENT * HAWQ_ALIGNMENT;
  return aligned_alloc(HAWQ_ALIGNMENT, whole ? whole : HAWQ_ALIGNMENT);
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

void hawq_workspace_clear(hawq_workspace *workspace) {
  for (int i = 0; i < HAWQ_WORKSPACE_BLOCKS; ++i) {
    free(workspace->blocks[i].data);
    workspace->blocks[i].data = NULL;
    workspace->blocks[i].bytes = 0;
    workspace->blocks[i].used = false;
  }
}
