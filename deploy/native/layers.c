/* hawq-layers LIBRARY INPUTS RESULTS layers|outputs THREADS
 *
 * Runs a library once through its C interface, on the machine or under an emulator. INPUTS holds all inputs, one after another, as
 * the library takes them, each with its type, rank, shape and bytes as below; others are refused. RESULTS gets a record for every kernel ("layers" only), then one without a name for the outputs: the name, the
 * number of buffers read and of those written, and for each its type, rank, shape, and bytes. Numbers are int64, little endian;
 * strings are preceded by their length. hawq_tvm/native/records.py reads it. */
#include <dlfcn.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "abi.h"

static void stop(const char *what, const char *why) {
  fprintf(stderr, "hawq-layers: %s: %s\n", what, why);
  exit(1);
}

static void put(FILE *results, const void *data, size_t bytes) {
  if (bytes != 0 && fwrite(data, 1, bytes, results) != bytes) stop("results", "cannot be written");
}

static void put_number(FILE *results, int64_t value) { put(results, &value, sizeof(value)); }

static void put_text(FILE *results, const char *text) {
  put_number(results, (int64_t)strlen(text));
  put(results, text, strlen(text));
}

static void put_tensor(FILE *results, const hawq_tensor *t) {
  put_text(results, t->dtype);
  put_number(results, t->rank);
  put(results, t->shape, (size_t)t->rank * sizeof(*t->shape));
  put_number(results, (int64_t)t->bytes);
  put(results, t->data, t->bytes);
}

static int64_t get_number(FILE *given) {
  int64_t value = -1;
  return fread(&value, sizeof(value), 1, given) == 1 ? value : -1;
}

/* An input into its buffer, if it is one that the library takes. */
static void get_tensor(FILE *given, const hawq_tensor *t, void *data) {
  const char *const other = "do not hold what the library takes: the package's manifest lies, or its library is another's";
  char dtype[32] = "";
  const int64_t length = get_number(given);
  if (length < 0 || length >= (int64_t)sizeof(dtype) || fread(dtype, 1, (size_t)length, given) != (size_t)length) stop("inputs", other);
  if (strcmp(dtype, t->dtype) != 0 || get_number(given) != t->rank) stop("inputs", other);
  for (int i = 0; i < t->rank; ++i) {
    if (get_number(given) != t->shape[i]) stop("inputs", other);
  }
  if (get_number(given) != (int64_t)t->bytes) stop("inputs", other);
  if (t->bytes != 0 && fread(data, 1, t->bytes, given) != t->bytes) stop("inputs", "hold too few bytes");
}

static void observe(void *results, const char *kernel, const hawq_tensor *read, int read_count, const hawq_tensor *written, int written_count) {
  put_text(results, kernel);
  put_number(results, read_count);
  put_number(results, written_count);
  for (int i = 0; i < read_count; ++i) put_tensor(results, &read[i]);
  for (int i = 0; i < written_count; ++i) put_tensor(results, &written[i]);
}

static void *library;

/* A function of the library; through memcpy, since ISO C converts no object pointer to a function's. */
static void find(const char *name, void *function) {
  void *symbol = dlsym(library, name);
  if (symbol == NULL) stop(name, "is not in the library");
  memcpy(function, &symbol, sizeof(symbol));
}

int main(int count, char **arguments) {
  if (count != 6) stop("usage", "hawq-layers LIBRARY INPUTS RESULTS layers|outputs THREADS");
  library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) stop(arguments[1], dlerror());
  hawq_model *(*create)(const hawq_options *);
  const hawq_tensor *(*input_tensor)(const hawq_model *, int), *(*output_tensor)(const hawq_model *, int);
  void *(*input)(hawq_model *, int);
  int (*inputs)(const hawq_model *), (*outputs)(const hawq_model *), (*run)(hawq_model *), (*watch)(hawq_model *, hawq_observer, void *);
  const char *(*error)(void);
  void (*destroy)(hawq_model *);
  find("hawq_model_create", &create);
  find("hawq_model_input_tensor", &input_tensor);
  find("hawq_model_output_tensor", &output_tensor);
  find("hawq_model_input", &input);
  find("hawq_model_inputs", &inputs);
  find("hawq_model_outputs", &outputs);
  find("hawq_model_run", &run);
  find("hawq_model_observe", &watch);
  find("hawq_error", &error);
  find("hawq_model_destroy", &destroy);

  FILE *given = fopen(arguments[2], "rb"), *results = fopen(arguments[3], "wb");
  if (given == NULL) stop(arguments[2], "cannot be read");
  if (results == NULL) stop(arguments[3], "cannot be written");
  const hawq_options options = {atoi(arguments[5])};
  hawq_model *model = create(&options);
  if (model == NULL) stop("the model cannot be created", error());
  for (int i = 0; i < inputs(model); ++i) get_tensor(given, input_tensor(model, i), input(model, i));
  if (fgetc(given) != EOF) stop("inputs", "hold more than the library takes");
  if (strcmp(arguments[4], "layers") == 0) watch(model, observe, results);
  if (run(model) != 0) stop("the run failed", error());
  put_text(results, "");
  put_number(results, 0);
  put_number(results, outputs(model));
  for (int i = 0; i < outputs(model); ++i) put_tensor(results, output_tensor(model, i));
  destroy(model);
  if (fclose(results) != 0) stop(arguments[3], "cannot be written");
  fclose(given);
  return 0;
}
