/* The launches of a plan in one call from Python (launcher.py).
 *
 * Triton's launcher takes a kernel's arguments as Python objects, all of them at every launch. Between two calls of one
 * plan only addresses change, so the parameters of all its launches are laid out once, and a call fills in where the
 * tensors are. cuda.h and the driver's library are not needed to build this: the four functions of the driver are looked
 * up where it runs.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <stdint.h>

#define TENSORS 32    /* of a plan: inputs, outputs and its scratch memory */
#define PARAMETERS 48 /* of a kernel */

/* CUlaunchConfig of cuda.h */
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned attribute_count;
} Config;

static int (*launch_kernel)(const Config *, void *, void **, void **);
static int (*parameter_info)(void *, size_t, size_t *, size_t *);
static int (*current_context)(void **);
static int (*error_string)(int, const char **);

typedef struct {
  int slot;       /* the tensor whose address is added to value, or -1 */
  unsigned size;  /* in bytes; the low bytes of the sum are taken, so numbers are little-endian */
  uint64_t value;
} Parameter;

typedef struct {
  void *function;
  unsigned grid[3], threads, shared;
  int count;
  Parameter parameters[PARAMETERS];
} Kernel;

typedef struct {
  PyObject *data_ptr; /* torch.Tensor.data_ptr */
  int inputs, tensors, kernels;
  Kernel kernel[];
} Launches;

static void destroy(PyObject *capsule) {
  Launches *launches = PyCapsule_GetPointer(capsule, NULL);
  Py_DECREF(launches->data_ptr);
  PyMem_Free(launches);
}

static int read_kernel(PyObject *from, Kernel *kernel, int tensors) {
  unsigned long long function;
  PyObject *parameters;
  if (!PyArg_ParseTuple(from, "KIIIIIO!", &function, &kernel->grid[0], &kernel->grid[1], &kernel->grid[2],
                        &kernel->threads, &kernel->shared, &PyTuple_Type, &parameters))
    return 0;
  kernel->function = (void *)(uintptr_t)function;
  kernel->count = (int)PyTuple_GET_SIZE(parameters);
  if (kernel->count > PARAMETERS) {
    PyErr_Format(PyExc_ValueError, "a kernel with %d parameters; at most %d fit", kernel->count, PARAMETERS);
    return 0;
  }
  size_t offset, size;
  for (int i = 0; i < kernel->count; i++) {
    Parameter *p = &kernel->parameters[i];
    unsigned long long value;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(parameters, i), "iIK", &p->slot, &p->size, &value)) return 0;
    p->value = value;
    if (p->slot < -1 || p->slot >= tensors || parameter_info(kernel->function, i, &offset, &size) || size != p->size) {
      PyErr_Format(PyExc_ValueError, "parameter %d of a kernel is not what it was compiled with", i);
      return 0;
    }
  }
  if (!parameter_info(kernel->function, kernel->count, &offset, &size)) {
    PyErr_Format(PyExc_ValueError, "a kernel has more parameters than the %d given", kernel->count);
    return 0;
  }
  return 1;
}

/* prepare(data_ptr, inputs, tensors, kernels) -> what `launch` takes. Raises ValueError if the driver knows the kernels
 * with other parameters. */
static PyObject *prepare(PyObject *module, PyObject *arguments) {
  PyObject *data_ptr, *kernels;
  int inputs, tensors;
  if (!PyArg_ParseTuple(arguments, "OiiO!", &data_ptr, &inputs, &tensors, &PyTuple_Type, &kernels)) return NULL;
  if (inputs > tensors || tensors > TENSORS)
    return PyErr_Format(PyExc_ValueError, "%d tensors, %d of them inputs; at most %d fit", tensors, inputs, TENSORS);
  int count = (int)PyTuple_GET_SIZE(kernels);
  Launches *launches = PyMem_Calloc(1, sizeof(Launches) + count * sizeof(Kernel));
  if (!launches) return PyErr_NoMemory();
  launches->inputs = inputs, launches->tensors = tensors, launches->kernels = count;
  for (int i = 0; i < count; i++)
    if (!read_kernel(PyTuple_GET_ITEM(kernels, i), &launches->kernel[i], tensors)) {
      PyMem_Free(launches);
      return NULL;
    }
  launches->data_ptr = Py_NewRef(data_ptr);
  PyObject *capsule = PyCapsule_New(launches, NULL, destroy);
  if (!capsule) Py_DECREF(data_ptr), PyMem_Free(launches);
  return capsule;
}

/* launch(launches, stream, *tensors) -> whether it launched: not if an input starts elsewhere than at a multiple of 16
 * bytes, nor if the thread has no context yet. Triton's launcher makes one. */
static PyObject *launch(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  Launches *launches = count > 1 ? PyCapsule_GetPointer(arguments[0], NULL) : NULL;
  if (!launches || count != 2 + launches->tensors) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "launch takes launches, a stream and their tensors");
    return NULL;
  }
  void *stream = PyLong_AsVoidPtr(arguments[1]);
  if (!stream && PyErr_Occurred()) return NULL;
  uint64_t starts[TENSORS], values[PARAMETERS];
  void *parameters[PARAMETERS];
  for (int i = 0; i < launches->tensors; i++) {
    starts[i] = 0;
    if (arguments[2 + i] == Py_None) continue;
    PyObject *start = PyObject_CallOneArg(launches->data_ptr, arguments[2 + i]);
    if (!start) return NULL;
    starts[i] = PyLong_AsUnsignedLongLong(start);
    Py_DECREF(start);
    if (starts[i] == (uint64_t)-1 && PyErr_Occurred()) return NULL;
    if (i < launches->inputs && starts[i] & 15) Py_RETURN_FALSE;
  }
  void *context = NULL;
  if (current_context(&context) || !context) Py_RETURN_FALSE;
  int error = 0;
  Py_BEGIN_ALLOW_THREADS
  for (int i = 0; i < launches->kernels && !error; i++) {
    const Kernel *kernel = &launches->kernel[i];
    for (int j = 0; j < kernel->count; j++) {
      const Parameter *p = &kernel->parameters[j];
      values[j] = p->value + (p->slot < 0 ? 0 : starts[p->slot]);
      parameters[j] = &values[j];
    }
    Config config = {{kernel->grid[0], kernel->grid[1], kernel->grid[2]}, {kernel->threads, 1, 1}, kernel->shared, stream};
    error = launch_kernel(&config, kernel->function, parameters, NULL);
  }
  Py_END_ALLOW_THREADS
  if (error) {
    const char *text = NULL;
    error_string(error, &text);
    return PyErr_Format(PyExc_RuntimeError, "launching a kernel failed: %s", text ? text : "an unknown error");
  }
  Py_RETURN_TRUE;
}

static PyMethodDef methods[] = {
    {"prepare", prepare, METH_VARARGS, NULL},
    {"launch", (PyCFunction)(void (*)(void))launch, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "adapter_ops_launch", NULL, -1, methods};

PyMODINIT_FUNC PyInit_adapter_ops_launch(void) {
  void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
  if (!driver) return PyErr_Format(PyExc_ImportError, "no driver: %s", dlerror());
  *(void **)&launch_kernel = dlsym(driver, "cuLaunchKernelEx");
  *(void **)&parameter_info = dlsym(driver, "cuFuncGetParamInfo");
  *(void **)&current_context = dlsym(driver, "cuCtxGetCurrent");
  *(void **)&error_string = dlsym(driver, "cuGetErrorString");
  if (!launch_kernel || !parameter_info || !current_context || !error_string)
    return PyErr_Format(PyExc_ImportError, "the driver is older than CUDA 12.4");
  return PyModule_Create(&definition);
}
