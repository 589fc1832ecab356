// The part of the DLPack 1.3 C ABI that reads a torch tensor, declared from the specification
// (https://dmlc.github.io/dlpack/latest/c_api.html). The build needs no header of torch or DLPack.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace diffcore::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct Version {
  uint32_t major, minor;
};
struct DeviceRef {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  DeviceRef device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};
struct ManagedTensor {
  Version version;
  void* manager_ctx;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeApiHeader {
  Version version;
  ExchangeApiHeader* prev_api;
};
using SetError = void (*)(void* context, const char* kind, const char* message);
struct ExchangeApi {
  ExchangeApiHeader header;
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* context, SetError set_error);
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*managed_to_object)(ManagedTensor* tensor, void** out);
  int (*borrow)(void* object, Tensor* out);  // takes no reference, checks nothing
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

static_assert(sizeof(void*) == 8, "the layout below requires a 64-bit platform");
static_assert(sizeof(Tensor) == 48 && offsetof(Tensor, shape) == 24 &&
              offsetof(Tensor, byte_offset) == 40);
static_assert(sizeof(ManagedTensor) == 80 && offsetof(ManagedTensor, tensor) == 32);
static_assert(sizeof(ExchangeApi) == 56 && offsetof(ExchangeApi, borrow) == 40);

}  // namespace diffcore::dlpack
