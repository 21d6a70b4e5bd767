/* A libcuda.so.1 with no GPU behind it: what Triton's driver asks of one, answered for sm_90.
 *
 * A launch does nothing but spin for rig_launch_ns. Between rig_log(1) and rig_log(0) launches are kept, with the bytes
 * of their parameters, whose sizes a cubin lists itself. A descriptor for the copy engine holds what it was made of. */
#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { FUNCTIONS = 4096, LAUNCHES = 1024, PARAMETERS = 64, BYTES = 1024 };

typedef struct { /* a module, which with Triton has one kernel */
  const char *image;
  int loaded, count;
  int sizes[PARAMETERS];
  char name[128];
} Function;

typedef struct {
  const Function *function;
  uint64_t stream;
  unsigned grid[3], block[3], shared, attributes, device;
  unsigned char parameters[BYTES]; /* one after the other, without gaps */
} Launch;

typedef struct { /* fills a CUtensorMap, which is 128 bytes */
  uint64_t base, shape[5], strides[4];
  uint32_t box[5];
  uint8_t dtype, rank, interleave, swizzle, promotion, fill, steps[5];
} Descriptor;
_Static_assert(sizeof(Descriptor) <= sizeof(CUtensorMap), "a descriptor has no room");

static Function functions[FUNCTIONS];
static Launch launches[LAUNCHES];
static int function_count, launch_count, logging;
static CUcontext context = (CUcontext)1;
long rig_launch_ns;
__thread int rig_device; /* the current one, which fakecuda.cpp sets: cubins are for one device, and so is a launch */

void rig_log(int on) {
  logging = on;
  if (on) launch_count = 0;
}
int rig_launches(void) { return launch_count; }
const Launch *rig_launch(int i) { return &launches[i]; }
int rig_number(const Function *f) { return f - functions; }

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *v) { *v = 13000; return 0; }
CUresult cuDeviceGetCount(int *n) { *n = 2; return 0; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = i; return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  switch (a) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *v = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *v = 0; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *v = 132; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *v = 227 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *v = 228 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *v = 32; break;
  default: *v = 65536;
  }
  return 0;
}
int rig_without_context; /* as in a thread that has done nothing on the GPU yet */
CUresult cuCtxGetCurrent(CUcontext *c) { *c = rig_without_context ? 0 : context; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = rig_device; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = context; return 0; }
CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 0; return 0; }
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return 0; }
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *c) { *c = 0; return 0; }
CUresult cuGetErrorString(CUresult e, const char **s) {
  switch (e) {
  case CUDA_ERROR_OUT_OF_MEMORY: *s = "more kernels or launches than the rig has room for"; break;
  case CUDA_ERROR_INVALID_IMAGE: *s = "the rig cannot read the parameters of this kernel"; break;
  case CUDA_ERROR_INVALID_HANDLE: *s = "this kernel was unloaded before its launch"; break;
  default: *s = "an error of the rig";
  }
  return 0;
}
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)v = p; return 0; }

CUresult cuModuleLoadData(CUmodule *m, const void *image) {
  if (function_count == FUNCTIONS) return CUDA_ERROR_OUT_OF_MEMORY;
  Function *f = &functions[function_count++];
  f->image = image, f->loaded = 1;
  *m = (CUmodule)f;
  return 0;
}
CUresult cuModuleUnload(CUmodule m) { ((Function *)m)->loaded = 0; return 0; }

/* Sizes of parameters are in the section .nv.info.NAME, a list of attributes: a byte of format, a byte of kind, two of
 * size or value. Format 4 has so many bytes behind it; kind 0x17 is one parameter, with its number in bytes 4 and 5 and
 * its size in the upper 14 bits of bytes 8 to 11. */
static int read_parameters(Function *f) {
  const char *image = f->image;
  const Elf64_Ehdr *head = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + head->e_shoff);
  const char *names = image + sections[head->e_shstrndx].sh_offset;
  char wanted[160];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", f->name);
  for (int i = 0; i < head->e_shnum; i++) {
    const unsigned char *p = (const unsigned char *)image + sections[i].sh_offset, *end = p + sections[i].sh_size;
    if (strcmp(names + sections[i].sh_name, wanted)) continue;
    while (p < end) {
      uint16_t size = 0, number;
      uint32_t word;
      if (p[0] == 4) memcpy(&size, p + 2, 2);
      if (p[0] == 4 && p[1] == 0x17) {
        memcpy(&number, p + 8, 2);
        memcpy(&word, p + 12, 4);
        if (number >= PARAMETERS) return 0;
        f->sizes[number] = word >> 18;
        if (number >= f->count) f->count = number + 1;
      }
      p += 4 + size;
    }
  }
  int bytes = 0;
  for (int i = 0; i < f->count; i++) bytes += f->sizes[i];
  return bytes <= BYTES;
}

CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  Function *found = (Function *)m;
  strncpy(found->name, name, sizeof found->name - 1);
  *f = (CUfunction)found;
  return read_parameters(found) ? 0 : CUDA_ERROR_INVALID_IMAGE;
}
CUresult cuFuncGetParamInfo(CUfunction function, size_t i, size_t *offset, size_t *size) {
  const Function *f = (const Function *)function;
  if (i >= (size_t)f->count) return CUDA_ERROR_INVALID_VALUE;
  *offset = 0, *size = f->sizes[i];
  for (size_t j = 0; j < i; j++) *offset += f->sizes[j];
  return 0;
}
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 128 : 0;
  return 0;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return 0; }

CUresult cuTensorMapEncodeTiled(CUtensorMap *m, CUtensorMapDataType type, cuuint32_t rank, void *base,
                                const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  Descriptor d = {(uint64_t)base, .dtype = type, .rank = rank, .interleave = interleave, .swizzle = swizzle,
                  .promotion = promotion, .fill = fill};
  if (rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < rank; i++) d.shape[i] = shape[i], d.box[i] = box[i], d.steps[i] = steps[i];
  for (unsigned i = 0; i + 1 < rank; i++) d.strides[i] = strides[i];
  memset(m, 0, sizeof *m);
  memcpy(m, &d, sizeof d);
  return 0;
}
CUresult cuTensorMapEncodeIm2col(CUtensorMap *m, CUtensorMapDataType t, cuuint32_t r, void *p, const cuuint64_t *d,
                                 const cuuint64_t *s, const int *lo, const int *hi, cuuint32_t c, cuuint32_t x,
                                 const cuuint32_t *e, CUtensorMapInterleave i, CUtensorMapSwizzle w,
                                 CUtensorMapL2promotion l, CUtensorMapFloatOOBfill o) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  const Function *f = (const Function *)function;
  if (!f->loaded) return CUDA_ERROR_INVALID_HANDLE;
  if (rig_launch_ns > 0) {
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    do clock_gettime(CLOCK_MONOTONIC, &b);
    while ((b.tv_sec - a.tv_sec) * 1000000000L + b.tv_nsec - a.tv_nsec < rig_launch_ns);
  }
  if (!logging) return 0;
  if (launch_count == LAUNCHES) return CUDA_ERROR_OUT_OF_MEMORY;
  Launch *l = &launches[launch_count++];
  *l = (Launch){f, (uint64_t)c->hStream, {c->gridDimX, c->gridDimY, c->gridDimZ},
                {c->blockDimX, c->blockDimY, c->blockDimZ}, c->sharedMemBytes, c->numAttrs, rig_device};
  unsigned char *to = l->parameters;
  for (int i = 0; i < f->count; to += f->sizes[i++]) memcpy(to, parameters[i], f->sizes[i]);
  return 0;
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream s, void **parameters, void **extra) {
  CUlaunchConfig c = {gx, gy, gz, bx, by, bz, shared, s, 0, 0};
  return cuLaunchKernelEx(&c, f, parameters, extra);
}
