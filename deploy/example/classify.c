/* classify PICTURE.ppm: the five best classes of a picture that has the size of the model's input, 1 x 3 x height x width. */
#include <stdio.h>
#include <string.h>

#include "model.h" /* of the package */

#if HAWQ_INPUT_0_RANK != 4
#error "this example is for a model with an input of 1 x 3 x height x width"
#endif

#ifndef MEAN /* how the network was trained: input = (pixel - MEAN) / STD, pixels from 0 to 255 */
#define MEAN 127.0f
#define STD 128.0f
#endif

/* The next sample as a pixel from 0 to 255; above a maximum of 255 a sample has two bytes, the high one first. */
static float pixel(FILE *picture, int most) {
  int sample = fgetc(picture);
  if (most > 255) sample = sample * 256 + fgetc(picture);
  return (float)sample * 255 / (float)most;
}

int main(int count, char **arguments) {
  const int shape[] = HAWQ_INPUT_0_SHAPE, height = shape[2], width = shape[3], pixels = height * width;
  int w = 0, h = 0, most = 0;
  if (shape[0] != 1 || shape[1] != 3 || strcmp(HAWQ_INPUT_0_DTYPE, "float32") || strcmp(HAWQ_OUTPUT_0_DTYPE, "float32"))
    return fprintf(stderr, "classify: the model takes no float32 of 1 x 3 x height x width, or gives no float32\n"), 2;
  if (count != 2) return fprintf(stderr, "usage: classify PICTURE.ppm, of %d x %d pixels\n", width, height), 2;
  FILE *picture = fopen(arguments[1], "rb");
  if (picture == NULL) return perror(arguments[1]), 2;
  const int known = fscanf(picture, "P6 %d %d %d", &w, &h, &most);
  if (known != 3 || w != width || h != height || most < 1 || most > 65535 || fgetc(picture) == EOF)
    return fprintf(stderr, "classify: %s is no binary PPM of %d x %d pixels\n", arguments[1], width, height), 2;

  hawq_model *model = hawq_model_create(NULL);
  if (model == NULL) return fprintf(stderr, "classify: %s\n", hawq_error()), 1;
  float *input = hawq_model_input(model, 0);
  for (int i = 0; i < 3 * pixels; ++i) input[i % 3 * pixels + i / 3] = (pixel(picture, most) - MEAN) / STD;
  if (feof(picture)) return fprintf(stderr, "classify: %s ends early\n", arguments[1]), 2;
  if (hawq_model_run(model) != 0) return fprintf(stderr, "classify: %s\n", hawq_error()), 1;

  const float *scores = hawq_model_output(model, 0);
  char taken[HAWQ_OUTPUT_0_ELEMENTS] = {0};
  for (int rank = 0; rank < 5 && rank < HAWQ_OUTPUT_0_ELEMENTS; ++rank) {
    int best = -1;
    for (int i = 0; i < HAWQ_OUTPUT_0_ELEMENTS; ++i)
      if (!taken[i] && (best < 0 || scores[i] > scores[best])) best = i;
    taken[best] = 1;
    printf("class %d: %g\n", best, scores[best]);
  }
  hawq_model_destroy(model);
  fclose(picture);
  return 0;
}
