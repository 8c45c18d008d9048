// What the CUDA files offer to the bindings: raw pointers, 64-bit sizes and strides, a stream. No torch in here.
//
// Every entry launches on the given stream of the current device, does not synchronise, launches nothing when there is
// nothing to do, and returns the error of the launch.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace stattn {

// csrc/copy.cu: dst[i] = src[i] for 0 <= i < bytes; the two must not overlap. Any alignment.
cudaError_t copy_bytes(const void* src, void* dst, int64_t bytes, cudaStream_t stream);

}  // namespace stattn
