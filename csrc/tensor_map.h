// Tensor maps: what a tensor copy knows of a tensor in device memory.
#pragma once

#include <cstdint>

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "stattn.h"

namespace stattn {

// Describes [B, T, H, W, heads, D] of 16-bit elements as the axes {D, W, H, T, X}, of which a copy moves boxes of 64
// columns and box = (t, h, w) tokens, `steps` apart (at most 8 where there is more than one). X holds the heads of all batches: batch b and head h lie at b * batch_step +
// h * head_step, for any strides that are multiples of 16 bytes.
struct TensorMap {
    CUtensorMap map;
    int batch_step, head_step;
};

// Reads nothing of the tensor. Results are kept for each thread, by value of the arguments.
cudaError_t tensor_map(const Strided& tensor, bool bf16, int batch, int heads, int head_dim, const int (&shape)[3],
                       const int (&box)[3], const int (&steps)[3], TensorMap* result);

}  // namespace stattn
