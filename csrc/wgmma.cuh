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

#define ELEMENT __nv_bfloat16
#define KIND "bf16"
#include "wgmma_products.cuh"
#undef ELEMENT
#undef KIND
#define ELEMENT __half
#define KIND "f16"
#include "wgmma_products.cuh"
#undef ELEMENT
#undef KIND

}  // namespace stattn::sm90
