/* A driver without a GPU: memory is malloc's, a graph is a list of launches, and every launch takes the time that the file
   $FAKE_CONFIG says: lines of "kernel output-argument output-bytes input-argument weights-argument weights-bytes microseconds mode".
   A kernel's output is made of its input and of the sum of its weights, which no order of them changes.
   When the process ends, the number of calls of every function and of what was not given back go to $FAKE_LOG. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char name[64], mode[16]; int out, in, weights; long out_bytes, weights_bytes; double us; } Kernel;
typedef struct { Kernel *kernel; void *args[16]; } Launch;
typedef struct { Launch *list; int count; } Graph;

static Kernel kernels[4096];
static int known, capturing, live_memory, live_graphs, live_modules;
static double clock_us;
static Graph capture;
static struct { const char *name; long count; } calls[64];

static void count(const char *name) {
  int i = 0;
  while (calls[i].name && strcmp(calls[i].name, name)) i++;
  calls[i].name = name;
  calls[i].count++;
}
#define COUNT count(__func__)
static int number(const char *name, int otherwise) { const char *v = getenv(name); return v ? atoi(v) : otherwise; }

__attribute__((destructor)) static void end(void) {
  FILE *f = getenv("FAKE_LOG") ? fopen(getenv("FAKE_LOG"), "w") : NULL;
  if (!f) return;
  for (int i = 0; calls[i].name; i++) fprintf(f, "%s %ld\n", calls[i].name, calls[i].count);
  fprintf(f, "live_memory %d\nlive_graphs %d\nlive_modules %d\n", live_memory, live_graphs, live_modules);
  fclose(f);
}

static int run(Launch *l) {
  Kernel *k = l->kernel;
  if (!strcmp(k->mode, "fail")) return 701;
  if (!strcmp(k->mode, "break")) return 700;
  uint8_t *out = *(uint8_t **)l->args[k->out], *in = *(uint8_t **)l->args[k->in], sum = 0;
  if (k->weights >= 0) for (long i = 0; i < k->weights_bytes; i++) sum += (*(uint8_t **)l->args[k->weights])[i];
  for (long i = 0; i < k->out_bytes; i++) out[i] = (uint8_t)(in[i % 16] + i + sum + (i == 3 && !strcmp(k->mode, "wrong")));
  clock_us += k->us;
  return 0;
}

int cuInit(unsigned f) { COUNT; return number("FAKE_INIT", 0); }
int cuDriverGetVersion(int *v) { COUNT; *v = 13010; return 0; }
int cuDeviceGetCount(int *n) { COUNT; *n = number("FAKE_COUNT", 1); return 0; }
int cuDeviceGet(int *d, int i) { COUNT; *d = i; return 0; }
int cuDeviceGetName(char *s, int n, int d) { COUNT; snprintf(s, n, "Fake GPU"); return 0; }
int cuDeviceGetAttribute(int *v, int which, int d) {
  COUNT;
  int capability = number("FAKE_CAPABILITY", 90);
  *v = which == 75 ? capability / 10 : which == 76 ? capability % 10 : which == 38 ? 1 << 16 : -1;
  return *v < 0;
}
int cuGetErrorString(int e, const char **s) { *s = "a fake error"; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { COUNT; *c = (void *)1; return 0; }
int cuCtxSetCurrent(void *c) {
  COUNT;
  FILE *f = fopen(getenv("FAKE_CONFIG"), "r");
  if (!f) return 999;
  Kernel *k = kernels;
  while (fscanf(f, "%63s %d %ld %d %d %ld %lf %15s", k->name, &k->out, &k->out_bytes, &k->in, &k->weights, &k->weights_bytes, &k->us, k->mode) == 8)
    k = kernels + ++known;
  fclose(f);
  return 0;
}
int cuMemGetInfo_v2(size_t *f, size_t *t) { COUNT; *f = *t = (size_t)number("FAKE_MEMORY_MB", 256) << 20; return 0; }
int cuMemAlloc_v2(uint64_t *p, size_t n) {
  COUNT;
  if (capturing || n > (size_t)number("FAKE_MEMORY_MB", 256) << 20) return capturing ? 900 : 2;
  *p = (uint64_t)aligned_alloc(256, (n + 255) / 256 * 256);
  live_memory++;
  return 0;
}
int cuMemFree_v2(uint64_t p) { COUNT; free((void *)p); live_memory--; return 0; }
int cuMemcpyHtoD_v2(uint64_t d, const void *s, size_t n) { COUNT; memcpy((void *)d, s, n); return capturing ? 900 : 0; }
int cuMemcpyDtoH_v2(void *d, uint64_t s, size_t n) { COUNT; memcpy(d, (void *)s, n); return 0; }
int cuMemcpyDtoD_v2(uint64_t d, uint64_t s, size_t n) { COUNT; memcpy((void *)d, (void *)s, n); return 0; }
int cuMemsetD8_v2(uint64_t d, unsigned char v, size_t n) { COUNT; memset((void *)d, v, n); return 0; }
int cuMemsetD8Async(uint64_t d, unsigned char v, size_t n, void *s) { COUNT; memset((void *)d, v, n); clock_us += 1000; return 0; }
int cuModuleLoadData(void **m, const void *data) { COUNT; *m = (void *)1; live_modules++; return number("FAKE_LOAD", 0); }
int cuModuleUnload(void *m) { COUNT; live_modules--; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) {
  COUNT;
  for (int i = 0; i < known; i++) if (!strcmp(kernels[i].name, name)) { *f = &kernels[i]; return 0; }
  return 500;
}
int cuFuncSetAttribute(void *f, int a, int v) { COUNT; return a == 8 && v >= 0 && v <= 232448 ? 0 : 1; }
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *s, void **args, void **extra) {
  COUNT;
  Launch l = {.kernel = f};
  if (!gx || !gy || !gz || !bx || bx * by * bz > 1024 || s != (void *)2) return 1;
  static uint64_t values[1 << 20];
  static int used;
  for (int i = 0; i <= l.kernel->out || i <= l.kernel->in || i <= l.kernel->weights; i++) {  /* the driver copies the arguments */
    l.args[i] = &values[used % (1 << 20)];
    values[used++ % (1 << 20)] = *(uint64_t *)args[i];
  }
  if (!capturing) return run(&l);
  capture.list = realloc(capture.list, (capture.count + 1) * sizeof l);
  capture.list[capture.count++] = l;
  return 0;
}
int cuStreamCreate(void **s, unsigned f) { COUNT; *s = (void *)2; return 0; }
int cuStreamSynchronize(void *s) { COUNT; return 0; }
int cuStreamBeginCapture_v2(void *s, int mode) { COUNT; capturing = 1; capture.list = NULL; capture.count = 0; return 0; }
int cuStreamEndCapture(void *s, void **g) { COUNT; capturing = 0; *g = memcpy(malloc(sizeof capture), &capture, sizeof capture); return 0; }
int cuGraphInstantiateWithFlags(void **e, void *g, uint64_t f) { COUNT; *e = memcpy(malloc(sizeof(Graph)), g, sizeof(Graph)); live_graphs++; return 0; }
int cuGraphDestroy(void *g) { COUNT; free(g); return 0; }
int cuGraphExecDestroy(void *e) { COUNT; free(((Graph *)e)->list); free(e); live_graphs--; return 0; }
int cuGraphLaunch(void *e, void *s) {
  COUNT;
  for (int i = 0; i < ((Graph *)e)->count; i++) { int code = run(((Graph *)e)->list + i); if (code) return code; }
  return 0;
}
int cuEventCreate(void **e, unsigned f) { COUNT; *e = calloc(1, sizeof(double)); return 0; }
int cuEventRecord(void *e, void *s) { COUNT; *(double *)e = clock_us; return 0; }
int cuEventSynchronize(void *e) { COUNT; return 0; }
int cuEventElapsedTime(float *ms, void *a, void *b) { COUNT; *ms = (float)((*(double *)b - *(double *)a) / 1e3); return 0; }
