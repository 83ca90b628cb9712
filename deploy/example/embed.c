/* embed TOKENS VECTORS: the embeddings of sentences, made by a sentence encoder of batch 1, and the cosines of each two.
 *
 * TOKENS holds for every sentence its ids and then its mask (1 up to its end, then 0), as 64-bit integers in the machine's order.
 * VECTORS gets a float32 vector of length 1 for each: the mean of its tokens' vectors.
 * hawq_tvm/docs/example-minilm.md shows how both are used. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model.h" /* of the package */

#if HAWQ_INPUTS != 2 || HAWQ_INPUT_0_RANK != 2 || HAWQ_INPUT_1_RANK != 2 || HAWQ_OUTPUT_0_RANK != 3
#error "this example is for a model of ids and mask, 1 x tokens each, that gives 1 x tokens x width"
#endif

enum { TOKENS = HAWQ_INPUT_1_ELEMENTS, WIDTH = HAWQ_OUTPUT_0_ELEMENTS / TOKENS };

/* The mean of the tokens that the mask shows, brought to length 1; -1 where it shows none. */
static int average(const float *outputs, const int64_t *mask, float *vector) {
  double mean[WIDTH] = {0}, square = 0;
  int64_t shown = 0;
  for (int t = 0; t < TOKENS; ++t) shown += mask[t];
  if (shown < 1) return -1;
  for (int t = 0; t < TOKENS; ++t)
    for (int i = 0; i < WIDTH; ++i) mean[i] += (double)outputs[t * WIDTH + i] * (double)mask[t];
  for (int i = 0; i < WIDTH; ++i) mean[i] /= (double)shown, square += mean[i] * mean[i];
  for (int i = 0; i < WIDTH; ++i) vector[i] = (float)(mean[i] / sqrt(square));
  return 0;
}

static double cosine(const float *a, const float *b) {
  double sum = 0;
  for (int i = 0; i < WIDTH; ++i) sum += (double)a[i] * (double)b[i];
  return sum;
}

int main(int count, char **arguments) {
  const int64_t ids_shape[] = HAWQ_INPUT_0_SHAPE, mask_shape[] = HAWQ_INPUT_1_SHAPE;
  if (strcmp(HAWQ_INPUT_0_DTYPE, "int64") || strcmp(HAWQ_INPUT_1_NAME, "attention_mask") || strcmp(HAWQ_INPUT_1_DTYPE, "int64") ||
      strcmp(HAWQ_OUTPUT_0_DTYPE, "float32") || ids_shape[0] != 1 || memcmp(ids_shape, mask_shape, sizeof ids_shape))
    return fprintf(stderr, "embed: the model takes no int64 ids and attention_mask of 1 x tokens, or gives no float32\n"), 2;
  if (count != 3) return fprintf(stderr, "usage: embed TOKENS VECTORS, sentences of %d tokens\n", TOKENS), 2;
  FILE *tokens = fopen(arguments[1], "rb");
  if (tokens == NULL) return perror(arguments[1]), 2;
  FILE *vectors = fopen(arguments[2], "wb");
  if (vectors == NULL) return perror(arguments[2]), 2;

  hawq_model *model = hawq_model_create(NULL);
  if (model == NULL) return fprintf(stderr, "embed: %s\n", hawq_error()), 1;
  int64_t *ids = hawq_model_input(model, 0), *mask = hawq_model_input(model, 1), sentence[2 * TOKENS];
  float pair[2][WIDTH];
  size_t read;
  for (int i = 0; (read = fread(sentence, 1, sizeof sentence, tokens)) == sizeof sentence; ++i) {
    memcpy(ids, sentence, HAWQ_INPUT_0_BYTES);
    memcpy(mask, sentence + TOKENS, HAWQ_INPUT_1_BYTES);
    if (hawq_model_run(model) != 0) return fprintf(stderr, "embed: %s\n", hawq_error()), 1;
    float *vector = pair[i % 2];
    if (average(hawq_model_output(model, 0), mask, vector) != 0)
      return fprintf(stderr, "embed: sentence %d of %s shows no token\n", i, arguments[1]), 2;
    if (fwrite(vector, sizeof pair[0], 1, vectors) != 1) return perror(arguments[2]), 2;
    if (i % 2) printf("%9.6f  sentences %d and %d\n", cosine(pair[0], pair[1]), i - 1, i);
  }
  hawq_model_destroy(model);
  fclose(tokens);
  if (fclose(vectors) != 0) return perror(arguments[2]), 2;
  if (read != 0) return fprintf(stderr, "embed: %s ends within a sentence of %d tokens\n", arguments[1], TOKENS), 2;
  return 0;
}
