/* Whether this processor, and its operating system, can execute the library. */
#ifndef HAWQ_CPU_H
#define HAWQ_CPU_H

/* 0 when all features (LLVM's names, NULL at the end) are there; asks Linux for the tile registers of AMX if they are among them. */
int hawq_check_cpu(const char *const *features);

/* How many processors the process may use, at least 1. */
int hawq_processors(void);

#endif
