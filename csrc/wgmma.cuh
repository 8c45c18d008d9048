// Warpgroup matrix products m64nNk16 in fp32 from bf16 or fp16.
//
// first: c = A B, next: c += A B. A lies in shared memory (a descriptor) or in registers (four per thread), B in shared
// memory: K-major beside an A in shared memory, N-major (transposed) beside an A in registers. _transposed: A lies
// M-major in shared memory, B N-major. All are asynchronous.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace stattn::sm90 {

template <typename Element, int N>
struct Wgmma;

}  // namespace stattn::sm90

#include "wgmma_bf16.cuh"
#include "wgmma_fp16.cuh"
