// A "cuda" device for a CPU build of PyTorch: the real dispatcher, device guards, autograd threads and TensorIterators
// over kernels that compute nothing, but for copies and fills. Memory is the host's, from a caching allocator built as
// CUDA's is: a mutex, a set of free blocks by size, a hash of live ones. Launches and products spin as `spin` says.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/TensorIterator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <callgrind.h>
#include <time.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::Stream;

static long launch_ns = 0, gemm_ns = 0, stream = 0;
extern "C" __thread int rig_device;  // the current device, in libcuda.c

static int exchange_device(int d) {
  int old = rig_device;
  if (d >= 0) rig_device = d;
  return old;
}

static void spin(long ns) {
  if (ns <= 0) return;
  timespec a, b;
  clock_gettime(CLOCK_MONOTONIC, &a);
  do clock_gettime(CLOCK_MONOTONIC, &b);
  while ((b.tv_sec - a.tv_sec) * 1000000000L + b.tv_nsec - a.tv_nsec < ns);
}
static void launch() { spin(launch_ns); }
static void gemm() { spin(gemm_ns); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override { return Device(DeviceType::CUDA, exchange_device(d.index())); }
  Device getDevice() const override { return Device(DeviceType::CUDA, rig_device); }
  void setDevice(Device d) const override { exchange_device(d.index()); }
  void uncheckedSetDevice(Device d) const noexcept override { rig_device = d.index(); }
  Stream getStream(Device d) const override { return Stream(Stream::DEFAULT, d); }
  Stream getDefaultStream(Device d) const override { return getStream(d); }
  Stream exchangeStream(Stream s) const override { return getStream(s.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return rig_device; }
  DeviceIndex deviceCount() const override { return 2; }
  DeviceIndex getCurrentDevice() const override { return rig_device; }
  void setCurrentDevice(DeviceIndex d) const override { exchange_device(d); }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { return exchange_device(d); }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return exchange_device(d); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}

struct Caching final : c10::Allocator {
  struct Block { size_t size; char* p; size_t wanted; bool live; };
  struct Less {
    bool operator()(const Block* a, const Block* b) const { return std::tie(a->size, a->p) < std::tie(b->size, b->p); }
  };
  std::recursive_mutex mutex;
  std::set<Block*, Less> free;
  std::unordered_map<void*, Block*> live;
  std::map<char*, Block*> all;  // by address, for `block`; a block is never given back
  static void release(void* p);
  c10::DataPtr allocate(size_t bytes) override {
    Device device(DeviceType::CUDA, rig_device);
    if (!bytes) return {nullptr, nullptr, &release, device};
    size_t size = (bytes + 511) / 512 * 512;
    std::lock_guard<std::recursive_mutex> lock(mutex);
    Block key{size, nullptr};
    auto it = free.lower_bound(&key);
    Block* b;
    if (it != free.end() && (*it)->size == size) {
      b = *it;
      free.erase(it);
    } else {
      b = new Block{size, nullptr};
      TORCH_CHECK(!posix_memalign(reinterpret_cast<void**>(&b->p), 512, size), "the rig is out of memory");
      all[b->p] = b;
    }
    b->wanted = bytes;
    b->live = true;
    live[b->p] = b;
    return {b->p, b->p, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
};
static Caching* caching = new Caching;
void Caching::release(void* p) {
  if (!p) return;
  std::lock_guard<std::recursive_mutex> lock(caching->mutex);
  auto it = caching->live.find(p);
  Block* b = it->second;
  caching->live.erase(it);
  b->live = false;
  caching->free.insert(b);
}
// Start, bytes asked for and whether it is in use, of the block that an address lies in; zeros where there is none.
static std::tuple<uint64_t, uint64_t, bool> block(uint64_t address) {
  std::lock_guard<std::recursive_mutex> lock(caching->mutex);
  auto it = caching->all.upper_bound(reinterpret_cast<char*>(address));
  if (it == caching->all.begin()) return {0, 0, false};
  auto* b = (--it)->second;
  auto start = reinterpret_cast<uint64_t>(b->p);
  if (address >= start + b->size) return {0, 0, false};
  return {start, b->wanted, b->live};
}
static auto registered = (c10::SetAllocator(DeviceType::CUDA, caching, 10), 0);

using c10::IntArrayRef;
using c10::SymInt;
using c10::optional;
static constexpr c10::DispatchKeySet keys(c10::DispatchKey::CUDA);

static Tensor empty(IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<Device> device,
                    optional<bool>, optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device ? *device : Device(DeviceType::CUDA, rig_device));
  return at::detail::empty_generic(size, caching, keys, c10::dtype_or_default(dtype), format);
}
static Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> dtype, optional<at::Layout>,
                            optional<Device> device, optional<bool>) {
  c10::DeviceGuard guard(device ? *device : Device(DeviceType::CUDA, rig_device));
  return at::detail::empty_strided_generic(size, stride, caching, keys, c10::dtype_or_default(dtype));
}
static Tensor host(const Tensor& t) {
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU).requires_grad(false));
}
static Tensor& copy_(Tensor& self, const Tensor& src, bool) {
  Tensor to = self.is_cuda() ? host(self) : self;
  to.copy_(src.is_cuda() ? host(src) : src);
  launch();
  return self;
}
static Tensor& fill_(Tensor& self, const at::Scalar& v) { host(self).fill_(v); launch(); return self; }
static Tensor& zero_(Tensor& self) { host(self).zero_(); launch(); return self; }
static const Tensor& resize_(const Tensor& self, IntArrayRef size, optional<at::MemoryFormat>) {
  auto impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  TORCH_CHECK(impl->numel() * impl->itemsize() <= self.storage().nbytes(), "the rig resizes within a storage only");
  return self;
}
static at::Scalar item(const Tensor& self) { return host(self).item(); }

static Tensor unary(const Tensor& a) {
  c10::OptionalDeviceGuard guard(at::device_of(a));
  Tensor out;
  auto it = at::TensorIteratorConfig().set_check_mem_overlap(true).add_owned_output(out).add_const_input(a).build();
  launch();
  return it.output(0);
}
static at::TensorIteratorConfig promoting() {
  return std::move(at::TensorIteratorConfig()
                       .set_check_mem_overlap(true)
                       .allow_cpu_scalars(true)
                       .promote_inputs_to_common_dtype(true)
                       .cast_common_dtype_to_outputs(true)
                       .enforce_safe_casting_to_output(true));
}
static Tensor binary(const Tensor& a, const Tensor& b) {
  c10::OptionalDeviceGuard guard(at::device_of(a));
  Tensor out;
  auto it = promoting().add_owned_output(out).add_const_input(a).add_const_input(b).build();
  launch();
  return it.output(0);
}
static Tensor& binary_(Tensor& a, const Tensor& b) {
  c10::OptionalDeviceGuard guard(at::device_of(a));
  auto it = promoting().add_output(a).add_const_input(a).add_const_input(b).build();
  launch();
  return a;
}
static Tensor add(const Tensor& a, const Tensor& b, const at::Scalar&) { return binary(a, b); }
static Tensor& add_(Tensor& a, const Tensor& b, const at::Scalar&) { return binary_(a, b); }
static Tensor mul(const Tensor& a, const Tensor& b) { return binary(a, b); }
static Tensor gelu(const Tensor& a, c10::string_view) { return unary(a); }
static Tensor gelu_backward(const Tensor& g, const Tensor& a, c10::string_view) { return binary(g, a); }
static Tensor product(const Tensor& x, const Tensor& w) {
  c10::OptionalDeviceGuard guard(at::device_of(x));
  TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(0));
  Tensor out = at::detail::empty_generic({x.size(0), w.size(1)}, caching, keys, x.scalar_type(), std::nullopt);
  gemm();
  return out;
}
static Tensor addmm(const Tensor& b, const Tensor& x, const Tensor& w, const at::Scalar&, const at::Scalar&) {
  auto expanded = at::expand_size(b, {x.size(0), w.size(1)}, "addmm");
  return product(x, w);
}
static Tensor& mm_out(const Tensor& x, const Tensor& w, Tensor& out) {
  c10::OptionalDeviceGuard guard(at::device_of(x));
  TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(0));
  gemm();
  return out;
}
static Tensor& addmm_out(const Tensor& b, const Tensor& x, const Tensor& w, const at::Scalar&, const at::Scalar&,
                         Tensor& out) {
  auto expanded = at::expand_size(b, {x.size(0), w.size(1)}, "addmm");
  return mm_out(x, w, out);
}
static Tensor sum_dims(const Tensor& a, at::OptionalIntArrayRef dims, bool keepdim, optional<at::ScalarType> dtype) {
  c10::OptionalDeviceGuard guard(at::device_of(a));
  auto shape = a.sizes().vec(), full = shape;
  auto strides = a.strides().vec();
  std::vector<bool> gone(a.dim(), !dims || dims->empty());
  if (dims)
    for (auto d : *dims) gone[d < 0 ? d + a.dim() : d] = true;
  std::vector<int64_t> size;
  for (int i = 0; i < a.dim(); i++) {
    if (gone[i]) full[i] = 1;
    if (!gone[i]) size.push_back(shape[i]); else if (keepdim) size.push_back(1);
  }
  Tensor out = at::detail::empty_generic(size, caching, keys, a.scalar_type(), std::nullopt);
  Tensor viewed = out.view(full).expand(shape);
  std::vector<int64_t> st = viewed.strides().vec();
  viewed = out.as_strided(shape, st);
  auto it = at::TensorIterator::reduce_op(viewed, a);
  launch();
  return out;
}
static Tensor sum_all(const Tensor& a, optional<at::ScalarType> dtype) {
  return sum_dims(a, at::OptionalIntArrayRef(), false, dtype);
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("fill_.Scalar", TORCH_FN(fill_));
  m.impl("zero_", TORCH_FN(zero_));
  m.impl("_local_scalar_dense", TORCH_FN(item));
  m.impl("add.Tensor", TORCH_FN(add));
  m.impl("add_.Tensor", TORCH_FN(add_));
  m.impl("mul.Tensor", TORCH_FN(mul));
  m.impl("gelu", TORCH_FN(gelu));
  m.impl("gelu_backward", TORCH_FN(gelu_backward));
  m.impl("addmm", TORCH_FN(addmm));
  m.impl("mm", TORCH_FN(product));
  m.impl("addmm.out", TORCH_FN(addmm_out));
  m.impl("mm.out", TORCH_FN(mm_out));
  m.impl("sum.dim_IntList", TORCH_FN(sum_dims));
  m.impl("sum", TORCH_FN(sum_all));
}

static PyObject* get_device(PyObject*, PyObject*) { return PyLong_FromLong(rig_device); }
static PyObject* raw_stream(PyObject*, PyObject* index) { return PyLong_FromLong(stream); }
static PyObject* exchange(PyObject*, PyObject* index) {
  return PyLong_FromLong(exchange_device(PyLong_AsLong(index)));
}
// What code that torch.compile made allocates with.
static PyObject* compiled_empty(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject *tuples[2], *dtype;
  if (!PyArg_ParseTuple(arguments, "OOO", &tuples[0], &tuples[1], &dtype)) return nullptr;
  at::SmallVector<int64_t, 8> sizes[2];
  for (int i = 0; i < 2; i++)
    for (Py_ssize_t j = 0; j < PyTuple_GET_SIZE(tuples[i]); j++)
      sizes[i].push_back(PyLong_AsSsize_t(PyTuple_GET_ITEM(tuples[i], j)));
  auto type = reinterpret_cast<THPDtype*>(dtype)->scalar_type;
  return THPVariable_Wrap(at::detail::empty_strided_generic(sizes[0], sizes[1], caching, keys, type));
  END_HANDLE_TH_ERRORS
}
static PyMethodDef methods[] = {
  {"_empty_strided_cuda", compiled_empty, METH_VARARGS, nullptr},
  {"_cuda_getDevice", get_device, METH_NOARGS, nullptr},
  {"_cuda_getCurrentRawStream", raw_stream, METH_O, nullptr},
  {"_cuda_exchangeDevice", exchange, METH_O, nullptr},
  {"_cuda_maybeExchangeDevice", exchange, METH_O, nullptr},
  {nullptr, nullptr, 0, nullptr}};

PYBIND11_MODULE(fakecuda, m) {
  PyModule_AddFunctions(m.ptr(), methods);
  m.def("spin", [](long launch, long gemm) { launch_ns = launch; gemm_ns = gemm; });
  m.def("block", block);
  m.def("set_stream", [](long number) { stream = number; });
  m.def("collect", [](bool on) {
    if (on) {
      CALLGRIND_START_INSTRUMENTATION;
      CALLGRIND_ZERO_STATS;
    } else {
      CALLGRIND_STOP_INSTRUMENTATION;
    }
  });
  m.def("dump", [](const std::string& name) { CALLGRIND_DUMP_STATS_AT(name.c_str()); });
}
