/* Made-up inputs of a model, and all its outputs in one array; for programs that know a model by its model.h. */
#ifndef ARRAYS_H
#define ARRAYS_H

#include <stdint.h>
#include <string.h>

#include "model.h"

static void fill(hawq_model *model, unsigned kind) {
  for (int i = 0; i < HAWQ_INPUTS; ++i) {
    const hawq_tensor *t = hawq_model_input_tensor(model, i);
    uint8_t *bytes = hawq_model_input(model, i);
    unsigned state = kind * 2654435761u + 12345u + (unsigned)i;
    for (size_t j = 0; j < t->bytes; ++j) bytes[j] = (uint8_t)((state = state * 1103515245u + 12345u) >> 16);
    if (strcmp(t->dtype, "float32") == 0) /* small numbers, no NaN */
      for (size_t j = 0; j < t->bytes / 4; ++j) ((float *)bytes)[j] = (float)bytes[4 * j] / 32.0f - 4.0f;
  }
}

static size_t gather(hawq_model *model, uint8_t *to) {
  size_t at = 0;
  for (int i = 0; i < HAWQ_OUTPUTS; ++i) {
    const hawq_tensor *t = hawq_model_output_tensor(model, i);
    if (to != NULL) memcpy(to + at, hawq_model_output(model, i), t->bytes);
    at += t->bytes;
  }
  return at;
}

#endif
