/* The error text of a thread. */
#ifndef HAWQ_ERROR_H
#define HAWQ_ERROR_H

#define HAWQ_ERROR_BYTES 512

/* Store a sentence (printf); returns -1, so that it can be returned on. */
int hawq_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
void hawq_clear_error(void);

#endif
