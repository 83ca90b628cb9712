/* classify PICTURE.ppm: the five best classes of a picture that has the size of the model's input, 1 x 3 x height x width. */
#include <stdio.h>

#include "model.h" /* of the package */

#ifndef MEAN /* how the network was trained: input = (byte - MEAN) / STD */
#define MEAN 127.0f
#define STD 128.0f
#endif

int main(int count, char **arguments) {
  const int shape[] = HAWQ_INPUT_0_SHAPE, height = shape[2], width = shape[3], pixels = height * width;
  int w = 0, h = 0;
  if (count != 2) return fprintf(stderr, "usage: classify PICTURE.ppm, of %d x %d pixels\n", width, height), 2;
  FILE *picture = fopen(arguments[1], "rb");
  if (picture == NULL) return perror(arguments[1]), 2;
  if (fscanf(picture, "P6 %d %d 255", &w, &h) != 2 || w != width || h != height || fgetc(picture) == EOF)
    return fprintf(stderr, "classify: %s is no binary PPM of %d x %d pixels\n", arguments[1], width, height), 2;

  hawq_model *model = hawq_model_create(NULL);
  if (model == NULL) return fprintf(stderr, "classify: %s\n", hawq_error()), 1;
  float *input = hawq_model_input(model, 0);
  for (int i = 0; i < 3 * pixels; ++i) input[i % 3 * pixels + i / 3] = ((float)fgetc(picture) - MEAN) / STD;
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
