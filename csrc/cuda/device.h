// Which GPU a launch goes to.
#pragma once

#include <cuda_runtime.h>

namespace fastlatent {

// Makes a device current while it lives, then the one that was: the caller's thread shares the driver with torch's own
// runtime. Ours is linked in statically and has its own idea of the current device.
class OnDevice {
 public:
  explicit OnDevice(int device) : error_(cudaGetDevice(&before_)) {
    if (error_ == cudaSuccess) error_ = cudaSetDevice(device);
    else before_ = device;
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_;
};

}  // namespace fastlatent
