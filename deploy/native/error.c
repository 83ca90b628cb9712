#include "error.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

#include "abi.h"
#include "plan.h"

static _Thread_local char text[HAWQ_ERROR_BYTES];

HAWQ_EXPORT const char *hawq_error(void) { return text; }

void hawq_clear_error(void) { text[0] = '\0'; }

int hawq_fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  return -1;
}

/* TVM's kernels report a wrong argument by this function. Weak, and left open to replacement: in a process with TVM, TVM's own gets the message. */
HAWQ_EXPORT __attribute__((weak)) void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  size_t used = (size_t)snprintf(text, sizeof(text), "%s: ", kind);
  for (int32_t i = 0; i < count && used < sizeof(text); ++i) {
    if (parts[i] != NULL) used += (size_t)snprintf(text + used, sizeof(text) - used, "%s", parts[i]);
  }
}
