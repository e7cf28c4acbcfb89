// The runtime of a simulated Ascend device: the acl functions that torch_npu needs a meaning for, the descriptors of
// operator arguments, and the step from an operator's C call to the Python function that computes it.
//
// Device memory is host memory. Streams and events are handles; work is done when it is submitted.

#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "operators.h"

namespace {

constexpr int kSuccess = 0;
constexpr int kOutOfMemory = 207001;  // ACL_ERROR_RT_MEMORY_ALLOCATION
constexpr size_t kAlignment = 512;
constexpr char kCannVersion[] = "9.1.0";
constexpr uint64_t kDeviceMemory = 64ull << 30;  // an Ascend910B1 has 64 GB

// ---- what the Python side hears ------------------------------------------------------------------------------------

enum Event : int { kMemcpy = 0, kSynchronize = 1 };

using RunOperator = int (*)(int operator_id, const Slot* slots);
using Observe = void (*)(int event, int kind, uint64_t bytes, const void* from, const void* to);
RunOperator run_operator = nullptr;
std::atomic<Observe> observe{nullptr};
thread_local std::string failure;

// what Python answers; 0 is what a callback gives that could not answer
enum Outcome : int { kDone = 1, kNotImplemented = 2, kFailed = 3, kInterrupted = 4 };

void notify(Event event, int kind, uint64_t bytes, const void* from = nullptr, const void* to = nullptr) {
  if (Observe callback = observe.load()) callback(event, kind, bytes, from, to);
}

[[noreturn]] void raise(int outcome, const std::string& message) {
  const c10::SourceLocation here{__func__, __FILE__, static_cast<uint32_t>(__LINE__)};
  if (outcome == kInterrupted) std::raise(SIGINT);  // what follows is a RuntimeError, which a program may catch
  if (outcome == kNotImplemented) throw c10::NotImplementedError(here, message);
  throw c10::Error(here, message);
}

// ---- memory --------------------------------------------------------------------------------------------------------

std::mutex memory_lock;
std::unordered_map<void*, size_t> device_blocks, host_blocks;
uint64_t device_bytes = 0;

int allocate(void** pointer, size_t size, std::unordered_map<void*, size_t>& blocks, bool is_device) {
  size = std::max<size_t>(1, (size + kAlignment - 1) / kAlignment) * kAlignment;
  std::lock_guard<std::mutex> guard(memory_lock);
  if (is_device && device_bytes + size > kDeviceMemory) return kOutOfMemory;
  *pointer = std::aligned_alloc(kAlignment, size);
  if (*pointer == nullptr) return kOutOfMemory;
  blocks[*pointer] = size;
  if (is_device) device_bytes += size;
  return kSuccess;
}

int release(void* pointer, std::unordered_map<void*, size_t>& blocks, bool is_device) {
  std::lock_guard<std::mutex> guard(memory_lock);
  auto block = blocks.find(pointer);
  if (block == blocks.end()) return pointer == nullptr ? kSuccess : 107000;  // ACL_ERROR_RT_PARAM_INVALID
  if (is_device) device_bytes -= block->second;
  blocks.erase(block);
  std::free(pointer);
  return kSuccess;
}

int copy(void* destination, size_t capacity, const void* source, size_t size, int kind) {
  if (size > capacity) return 107000;
  notify(kMemcpy, kind, size, source, destination);
  std::memmove(destination, source, size);
  return kSuccess;
}

// ---- descriptors of arguments --------------------------------------------------------------------------------------

enum Kind : int64_t { kTensor = 1, kTensorList, kIntArray, kFloatArray, kBoolArray, kScalar, kScalarList, kTensorDesc, kDataBuffer };

struct Descriptor;
std::mutex descriptors_lock;
std::unordered_map<Descriptor*, std::thread::id> descriptors;  // those that live, and who made them

struct Descriptor {
  int64_t kind;
  std::atomic<int64_t> references{1};
  explicit Descriptor(Kind kind) : kind(kind) {
    std::lock_guard<std::mutex> guard(descriptors_lock);
    descriptors[this] = std::this_thread::get_id();
  }
  ~Descriptor() {
    std::lock_guard<std::mutex> guard(descriptors_lock);
    descriptors.erase(this);
  }
};

// laid out as moe_npu/sim/descriptors.py reads it
struct Tensor : Descriptor {
  static constexpr int kMaxDim = 16;
  int64_t dim = 0, offset = 0, dtype = 0, format = 0, storage_dim = 0;
  int64_t shape[kMaxDim] = {}, strides[kMaxDim] = {}, storage_shape[kMaxDim] = {};
  void* data = nullptr;
  Tensor() : Descriptor(kTensor) {}
};

// a list of anything: pointers to descriptors, or values of eight bytes
struct Array : Descriptor {
  uint64_t size;
  void* values;
  Array(Kind kind, uint64_t size) : Descriptor(kind), size(size), values(std::calloc(size + 1, 8)) {}
};

struct Scalar : Descriptor {
  int64_t dtype;
  uint8_t value[16] = {};
  explicit Scalar(int dtype) : Descriptor(kScalar), dtype(dtype) {}
};

// of CANN's older interface
struct TensorDesc : Descriptor {
  int dtype, format;
  std::vector<int64_t> shape, storage_shape;
  TensorDesc(int dtype, int format, const std::vector<int64_t>& shape)
      : Descriptor(kTensorDesc), dtype(dtype), format(format), shape(shape), storage_shape(shape) {}
};

struct DataBuffer : Descriptor {
  void* data;
  explicit DataBuffer(void* data) : Descriptor(kDataBuffer), data(data) {}
};

void retain(void* pointer) {
  if (pointer != nullptr) static_cast<Descriptor*>(pointer)->references++;
}

void drop(const void* pointer) {
  auto* descriptor = static_cast<Descriptor*>(const_cast<void*>(pointer));
  if (descriptor == nullptr || --descriptor->references > 0) return;
  switch (descriptor->kind) {
    case kTensor:
      delete static_cast<Tensor*>(descriptor);
      return;
    case kScalar:
      delete static_cast<Scalar*>(descriptor);
      return;
    case kTensorDesc:
      delete static_cast<TensorDesc*>(descriptor);
      return;
    case kDataBuffer:
      delete static_cast<DataBuffer*>(descriptor);
      return;
    default:
      auto* array = static_cast<Array*>(descriptor);
      if (array->kind == kTensorList || array->kind == kScalarList) {
        for (uint64_t i = 0; i < array->size; i++) drop(static_cast<void**>(array->values)[i]);
      }
      std::free(array->values);
      delete array;
  }
}

// An adapter that is interrupted by an error does not destroy what it made: a call has no descriptors but its own.
void abandon_descriptors() {
  const char* task_queue = std::getenv("TASK_QUEUE_ENABLE");
  if (task_queue == nullptr || std::strcmp(task_queue, "0") != 0) return;  // calls that wait have some, too
  std::vector<Descriptor*> own;
  {
    std::lock_guard<std::mutex> guard(descriptors_lock);
    for (const auto& [descriptor, thread] : descriptors) {
      if (thread == std::this_thread::get_id()) own.push_back(descriptor);
    }
  }
  for (Descriptor* descriptor : own) {  // each by itself: lists own nothing any more
    if (descriptor->kind == kTensorList || descriptor->kind == kScalarList) static_cast<Array*>(descriptor)->size = 0;
    descriptor->references = 1;
    drop(descriptor);
  }
}

template <typename From, typename To>
void* create_array(Kind kind, const From* values, uint64_t size) {
  auto* array = new Array(kind, size);
  for (uint64_t i = 0; i < size; i++) static_cast<To*>(array->values)[i] = static_cast<To>(values[i]);
  return array;
}

// ---- operators -----------------------------------------------------------------------------------------------------

struct Executor {
  const Operator* op;
  std::vector<Slot> slots;
  ~Executor() {
    for (size_t i = 0; i < slots.size(); i++) {
      if (op->signature[i] >= 'A' && op->signature[i] <= 'Z') drop(slots[i].pointer);
    }
  }
};

}  // namespace

extern "C" {

void moe_npu_sim_connect(RunOperator run) { run_operator = run; }
void moe_npu_sim_observe(Observe callback) { observe = callback; }
void moe_npu_sim_fail(const char* message) { failure = message; }
uint64_t moe_npu_sim_num_descriptors() {
  std::lock_guard<std::mutex> guard(descriptors_lock);
  return descriptors.size();
}

// calls at_npu::native::get_npu_storage_sizes(const at::Tensor&), whose argument is a pointer to its implementation;
// the number of sizes, or -1 if there are too many
int moe_npu_sim_storage_sizes(void* function, void* tensor, int64_t* sizes) {
  const auto result = reinterpret_cast<std::vector<int64_t> (*)(void* const&)>(function)(tensor);
  if (result.size() > Tensor::kMaxDim) return -1;
  std::copy(result.begin(), result.end(), sizes);
  return static_cast<int>(result.size());
}

// first phase of an operator: keep the arguments (capital letters in the signature are descriptors)
int moe_npu_sim_prepare(const Operator* op, const Slot* slots, uint64_t* workspace_size, void** executor) {
  auto* kept = new Executor{op, std::vector<Slot>(slots, slots + std::strlen(op->signature))};
  for (size_t i = 0; i < kept->slots.size(); i++) {
    if (op->signature[i] >= 'A' && op->signature[i] <= 'Z') retain(kept->slots[i].pointer);
  }
  *workspace_size = 0;
  *executor = kept;
  return kSuccess;
}

// second phase: let Python compute
int moe_npu_sim_launch(void* executor) {
  std::unique_ptr<Executor> call(static_cast<Executor*>(executor));
  if (run_operator == nullptr) raise(kFailed, std::string(call->op->name) + ": the simulated device is not active");
  failure = std::string(call->op->name) + ": interrupted on the simulated device";  // unless Python says more
  const int outcome = run_operator(call->op->id, call->slots.data());
  if (outcome != kDone) {
    call.reset();
    abandon_descriptors();
    raise(outcome, failure);
  }
  return kSuccess;
}

void moe_npu_sim_require(int outcome) {
  if (outcome != kDone) raise(outcome, failure);
}

void moe_npu_sim_unimplemented(const char* what) {
  abandon_descriptors();
  raise(kNotImplemented, std::string(what) + " is not implemented on the simulated device");
}

void* aclCreateTensor(const int64_t* shape, uint64_t dim, int dtype, const int64_t* strides, int64_t offset, int format,
                      const int64_t* storage_shape, uint64_t storage_dim, void* data) {
  if (dim > Tensor::kMaxDim || storage_dim > Tensor::kMaxDim) raise(kFailed, "aclCreateTensor: more than 16 dimensions");
  auto* tensor = new Tensor;
  tensor->dim = dim, tensor->offset = offset, tensor->dtype = dtype, tensor->format = format;
  tensor->storage_dim = storage_dim, tensor->data = data;
  std::copy_n(shape, dim, tensor->shape);
  if (strides != nullptr) {
    std::copy_n(strides, dim, tensor->strides);
  } else {
    int64_t stride = 1;
    for (int64_t i = static_cast<int64_t>(dim) - 1; i >= 0; i--) {
      tensor->strides[i] = stride;
      stride *= shape[i];
    }
  }
  std::copy_n(storage_shape, storage_dim, tensor->storage_shape);
  return tensor;
}
void* aclCreateTensorList(void* const* values, uint64_t size) {
  return create_array<void* const, void*>(kTensorList, values, size);
}
void* aclCreateScalarList(void* const* values, uint64_t size) {
  return create_array<void* const, void*>(kScalarList, values, size);
}
void* aclCreateIntArray(const int64_t* values, uint64_t size) {
  return create_array<int64_t, int64_t>(kIntArray, values, size);
}
void* aclCreateFloatArray(const float* values, uint64_t size) {
  return create_array<float, double>(kFloatArray, values, size);
}
void* aclCreateBoolArray(const bool* values, uint64_t size) {
  return create_array<bool, int64_t>(kBoolArray, values, size);
}
void* aclCreateScalar(const void* value, int dtype) {
  constexpr int kComplex128 = 17, kComplex64 = 16, kDouble = 11, kInt64 = 9, kUint64 = 10, kFloat = 0, kInt32 = 3;
  constexpr int kUint32 = 8, kInt16 = 6, kUint16 = 7, kHalf = 1, kBfloat16 = 27, kComplex32 = 33;
  auto* scalar = new Scalar(dtype);
  size_t size = 1;
  switch (dtype) {
    case kComplex128: size = 16; break;
    case kComplex64: case kDouble: case kInt64: case kUint64: size = 8; break;
    case kFloat: case kInt32: case kUint32: case kComplex32: size = 4; break;
    case kInt16: case kUint16: case kHalf: case kBfloat16: size = 2; break;
    default: break;
  }
  std::memcpy(scalar->value, value, size);
  return scalar;
}
int aclDestroyTensor(const void* value) { return drop(value), kSuccess; }
int aclDestroyTensorList(const void* value) { return drop(value), kSuccess; }
int aclDestroyScalarList(const void* value) { return drop(value), kSuccess; }
int aclDestroyIntArray(const void* value) { return drop(value), kSuccess; }
int aclDestroyFloatArray(const void* value) { return drop(value), kSuccess; }
int aclDestroyBoolArray(const void* value) { return drop(value), kSuccess; }
int aclDestroyScalar(const void* value) { return drop(value), kSuccess; }
int aclGetViewShape(const void* value, int64_t** shape, uint64_t* dim) {
  const auto* tensor = static_cast<const Tensor*>(value);
  *dim = tensor->dim;
  *shape = new int64_t[tensor->dim + 1];  // the caller deletes it
  std::copy_n(tensor->shape, tensor->dim, *shape);
  return kSuccess;
}
// the shape that a tensor will have in memory in another format; refusing one sends torch_npu to CANN's older operators
int aclnnNpuFormatCastCalculateSizeAndFormat(const void* source, int format, int additional_dtype, int64_t** shape,
                                             uint64_t* dim, int* actual_format) {
  constexpr int kNd = 2, kFractalNz = 29, kRefused = 161002;  // ACLNN_ERR_PARAM_INVALID
  constexpr int kInt8 = 2, kUint8 = 4, kInt32 = 3, kFloat = 0, kInt4 = 29;
  const auto* tensor = static_cast<const Tensor*>(source);
  const int64_t rank = tensor->dim;
  *actual_format = format;
  if (format == kNd && tensor->format == kFractalNz) return aclGetViewShape(source, shape, dim);
  if (format != kFractalNz || tensor->format == kFractalNz || rank < 2) return kRefused;
  int64_t columns = 16;  // of a tile, which has 32 bytes in each row
  if (additional_dtype == kInt8 || additional_dtype == kUint8) columns = 32;
  if (additional_dtype == kInt32 || additional_dtype == kFloat) columns = 8;
  if (additional_dtype == kInt4) columns = 64;
  *dim = rank + 2;
  *shape = new int64_t[rank + 2];  // the caller deletes it
  std::copy_n(tensor->shape, rank - 2, *shape);
  const int64_t tiles[] = {(tensor->shape[rank - 1] + columns - 1) / columns, (tensor->shape[rank - 2] + 15) / 16, 16,
                           columns};
  std::copy_n(tiles, 4, *shape + rank - 2);
  return kSuccess;
}

// ---- graph operators, launched one by one: CANN's older interface ----------------------------------------------------

void* aclCreateTensorDesc(int dtype, int dim, const int64_t* shape, int format) {
  const std::vector<int64_t> sizes(shape, shape + dim);
  return new TensorDesc(dtype, format, sizes);
}
int aclSetTensorFormat(void* desc, int format) { return static_cast<TensorDesc*>(desc)->format = format, kSuccess; }
int aclSetTensorShape(void* desc, int dim, const int64_t* shape) {
  static_cast<TensorDesc*>(desc)->storage_shape.assign(shape, shape + dim);
  return kSuccess;
}
void aclDestroyTensorDesc(const void* desc) { drop(desc); }
void* aclCreateDataBuffer(void* data, size_t) { return new DataBuffer(data); }
int aclDestroyDataBuffer(const void* buffer) { return drop(buffer), kSuccess; }
// Attributes are not kept: shapes and dtypes of the outputs tell what the kernels need, except for masks of StridedSlice.
int aclopSetAttrInt(void*, const char* name, int64_t value) {
  for (const char* mask : {"begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask"}) {
    if (value != 0 && std::strcmp(name, mask) == 0) moe_npu_sim_unimplemented((std::string("the attribute ") + name).c_str());
  }
  return kSuccess;
}
int aclopCompileAndExecute(const char* name, int num_inputs, const TensorDesc* const* inputs,
                           const DataBuffer* const* input_data, int num_outputs, const TensorDesc* const* outputs,
                           const DataBuffer* const* output_data, const void*, int, int, const char*, void*) {
  const Operator* op = moe_npu_sim_find(name);
  if (op == nullptr) moe_npu_sim_unimplemented((std::string("the graph operator ") + name).c_str());
  if (std::strlen(op->signature) != static_cast<size_t>(num_inputs + num_outputs)) {
    raise(kNotImplemented, std::string(name) + ": an optional tensor is not implemented on the simulated device");
  }
  std::vector<Slot> slots;
  auto add = [&slots](const TensorDesc& desc, const DataBuffer& buffer) {
    slots.push_back({aclCreateTensor(desc.shape.data(), desc.shape.size(), desc.dtype, nullptr, 0, desc.format,
                                     desc.storage_shape.data(), desc.storage_shape.size(), buffer.data)});
  };
  for (int i = 0; i < num_inputs; i++) add(*inputs[i], *input_data[i]);
  for (int i = 0; i < num_outputs; i++) add(*outputs[i], *output_data[i]);
  uint64_t workspace_size;
  void* executor;
  moe_npu_sim_prepare(op, slots.data(), &workspace_size, &executor);
  for (const Slot& slot : slots) drop(slot.pointer);
  return moe_npu_sim_launch(executor);
}
int InitHugeMemThreadLocal(void*, bool) { return kSuccess; }
void UnInitHugeMemThreadLocal(void*, bool) {}
void ReleaseHugeMem(void*, bool) {}

// ---- device, streams, events ---------------------------------------------------------------------------------------

static thread_local int current_device = 0;
static std::atomic<uintptr_t> next_handle{64};

static uint32_t device_count() {
  const char* value = std::getenv("MOE_NPU_SIM_DEVICES");
  const uint32_t count = value == nullptr ? 1 : std::max(1, std::atoi(value));
  const char* visible = std::getenv("ASCEND_RT_VISIBLE_DEVICES");  // their numbers, with commas between them
  if (visible == nullptr) return count;
  const uint32_t listed = *visible == 0 ? 0 : 1 + std::count(visible, visible + std::strlen(visible), ',');
  return std::min(count, listed);
}
static int new_handle(void** handle) {
  *handle = reinterpret_cast<void*>(next_handle.fetch_add(64));
  return kSuccess;
}
static int synchronize() {
  notify(kSynchronize, 0, 0);
  return kSuccess;
}

int aclrtGetDeviceCount(uint32_t* count) { return *count = device_count(), kSuccess; }
int aclrtSetDevice(int device) {
  if (device < 0 || static_cast<uint32_t>(device) >= device_count()) return 107001;  // ACL_ERROR_RT_DEVICE_ID_INVALID
  return current_device = device, kSuccess;
}
int aclrtGetDevice(int* device) { return *device = current_device, kSuccess; }
const char* aclrtGetSocName() {
  const char* value = std::getenv("MOE_NPU_SIM_SOC");
  return value == nullptr ? "Ascend910B1" : value;
}
int aclrtDeviceCanAccessPeer(int* can_access, int, int) { return *can_access = 1, kSuccess; }
int aclrtMalloc(void** pointer, size_t size, int) { return allocate(pointer, size, device_blocks, true); }
int aclrtMallocAlign32(void** pointer, size_t size, int) { return allocate(pointer, size, device_blocks, true); }
int aclrtMallocHost(void** pointer, size_t size) { return allocate(pointer, size, host_blocks, false); }
int aclrtFree(void* pointer) { return release(pointer, device_blocks, true); }
int aclrtFreeHost(void* pointer) { return release(pointer, host_blocks, false); }
int aclrtMemcpy(void* to, size_t capacity, const void* from, size_t size, int kind) {
  return copy(to, capacity, from, size, kind);
}
int aclrtMemcpyAsync(void* to, size_t capacity, const void* from, size_t size, int kind, void* stream) {
  moe_npu_sim_wait_for_stream(stream);
  return copy(to, capacity, from, size, kind);
}
int aclrtMemcpyAsyncWithCondition(void* to, size_t capacity, const void* from, size_t size, int kind, void* stream) {
  return aclrtMemcpyAsync(to, capacity, from, size, kind, stream);
}
int aclrtMemset(void* to, size_t capacity, int value, size_t size) {
  if (size > capacity) return 107000;
  return std::memset(to, value, size), kSuccess;
}
int aclrtMemsetAsync(void* to, size_t capacity, int value, size_t size, void* stream) {
  moe_npu_sim_wait_for_stream(stream);
  return aclrtMemset(to, capacity, value, size);
}
int aclrtGetMemInfo(int, size_t* available, size_t* total) {
  std::lock_guard<std::mutex> guard(memory_lock);
  *total = kDeviceMemory, *available = kDeviceMemory - device_bytes;
  return kSuccess;
}
int aclrtPointerGetAttributes(const void* pointer, void* attributes) {
  constexpr int kHost = 0, kDevice = 1, kUnregistered = 2;  // aclrtMemLocationType
  constexpr size_t kSize = 28;  // of aclrtPtrAttributes, which begins with the device and the type
  std::lock_guard<std::mutex> guard(memory_lock);
  std::memset(attributes, 0, kSize);
  auto* location = static_cast<int32_t*>(attributes);
  auto contains = [pointer](const std::unordered_map<void*, size_t>& blocks) {
    return std::any_of(blocks.begin(), blocks.end(), [pointer](const auto& block) {
      const auto *begin = static_cast<const char*>(block.first), *address = static_cast<const char*>(pointer);
      return address >= begin && address < begin + block.second;
    });
  };
  location[0] = current_device;
  location[1] = contains(host_blocks) ? kHost : contains(device_blocks) ? kDevice : kUnregistered;
  return kSuccess;
}
int aclrtCreateStream(void** stream) { return new_handle(stream); }
int aclrtCreateStreamWithConfig(void** stream, uint32_t, uint32_t) { return new_handle(stream); }
int aclrtCreateEvent(void** event) { return new_handle(event); }
int aclrtCreateEventWithFlag(void** event, uint32_t) { return new_handle(event); }
int aclrtCreateEventExWithFlag(void** event, uint32_t) { return new_handle(event); }
int aclrtQueryEventStatus(void* event, int* status) {
  return *status = moe_npu_sim_is_event_complete(event) ? 1 : 0, kSuccess;
}
int aclrtQueryEventWaitStatus(void* event, int* status) { return aclrtQueryEventStatus(event, status); }
int aclrtStreamQuery(void* stream, int* status) {
  return *status = moe_npu_sim_is_stream_idle(stream) ? 0 : 1, kSuccess;
}
int aclrtEventElapsedTime(float* milliseconds, void*, void*) { return *milliseconds = 0, kSuccess; }
int aclrtSynchronizeStream(void* stream) { return moe_npu_sim_wait_for_stream(stream), synchronize(); }
int aclrtSynchronizeStreamWithTimeout(void* stream, int) { return aclrtSynchronizeStream(stream); }
int aclrtSynchronizeDevice() { return moe_npu_sim_wait_for_all(), synchronize(); }
int aclrtSynchronizeDeviceWithTimeout(int) { return aclrtSynchronizeDevice(); }
int aclrtSynchronizeEvent(void* event) { return moe_npu_sim_wait_for_event(event), synchronize(); }
int aclrtGetCurrentContext(void** context) { return *context = reinterpret_cast<void*>(0x40), kSuccess; }
int aclrtCreateContext(void** context, int) { return aclrtGetCurrentContext(context); }
int aclrtGetRunMode(int* mode) { return *mode = 1, kSuccess; }  // host
int aclrtGetVersion(int* major, int* minor, int* patch) { return *major = 1, *minor = 14, *patch = 0, kSuccess; }
int aclGetDeviceCapability(uint32_t, int which, int64_t* value) {
  constexpr int kCores = 0, kVectorCores = 1, kL2Cache = 2;  // aclDeviceInfo
  switch (which) {
    case kCores: *value = 24; break;
    case kVectorCores: *value = 48; break;
    case kL2Cache: *value = 192 << 20; break;
    default: moe_npu_sim_unimplemented(("aclGetDeviceCapability of " + std::to_string(which)).c_str());
  }
  return kSuccess;
}
int aclrtGetDeviceInfo(uint32_t, int attribute, int64_t* value) {
  constexpr int kCores = 101, kCubeCores = 102, kVectorCores = 201, kMemory = 301, kL2Cache = 302;  // aclrtDevAttr
  switch (attribute) {
    case kCores: case kCubeCores: *value = 24; break;
    case kVectorCores: *value = 48; break;
    case kMemory: *value = static_cast<int64_t>(kDeviceMemory); break;
    case kL2Cache: *value = 192 << 20; break;
    default: moe_npu_sim_unimplemented(("aclrtGetDeviceInfo of attribute " + std::to_string(attribute)).c_str());
  }
  return kSuccess;
}
int aclrtSetDeviceSatMode(int mode) {
  constexpr int kInfNan = 1;  // aclrtFloatOverflowMode
  if (mode != kInfNan) moe_npu_sim_unimplemented("aclrtSetDeviceSatMode with saturation instead of infinity");
  return kSuccess;
}
int aclrtGetSysParamOpt(int, int64_t* value) { return *value = 0, kSuccess; }
int aclrtGetPrimaryCtxState(int, uint32_t* flags, int* active) { return *flags = 0, *active = 1, kSuccess; }
int aclmdlRICaptureGetInfo(void*, int* status, void** model) { return *status = 0, *model = nullptr, kSuccess; }
int aclmdlRICaptureThreadExchangeMode(int*) { return kSuccess; }  // no graph is captured
const char* aclGetRecentErrMsg() { return ""; }
int aclGetCannAttribute(int which, int32_t* value) {
  return *value = which == 0, kSuccess;  // ACL_CANN_ATTR_INF_NAN: numbers overflow to infinity; no other feature
}
int aclrtDeviceGetUuid(int device, void* uuid) {  // 16 bytes
  std::memset(uuid, 0, 16);
  return *static_cast<int32_t*>(uuid) = device, kSuccess;
}
int aclsysGetCANNVersion(int, void* version) {  // the structure begins with the text
  std::memset(version, 0, 128);
  return std::strcpy(static_cast<char*>(version), kCannVersion), kSuccess;
}
int aclsysGetVersionStr(const char*, char* version) { return std::strcpy(version, kCannVersion), kSuccess; }
size_t aclGetCompileoptSize(int) { return 64; }
int aclGetCompileopt(int, char* value, size_t size) {
  if (size > 0) std::strncpy(value, "disable", size);
  return kSuccess;
}

}  // extern "C"
