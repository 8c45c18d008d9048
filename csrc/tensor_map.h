// Tensor maps: what a tensor copy knows of a tensor in device memory.
#pragma once

#include <cstdint>

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "stattn.h"

namespace stattn {

// Describes [B, T, H, W, heads, D] as the axes {D, W, H, T, X}, of which a copy moves boxes of 128 bytes of the columns
// and box = (t, h, w) tokens, `steps` apart (at most 8 where there is more than one). X holds the heads of all batches:
// batch b and head h lie at b * batch_step + h * head_step, for any strides that are multiples of 16 bytes.
enum Elements { FP16, BF16, FP32 };
struct TensorMap {
    CUtensorMap map;
    int batch_step, head_step;
};

// Reads nothing of the tensor. Results are kept for each thread, by value of the arguments.
cudaError_t tensor_map(const Strided& tensor, Elements elements, int batch, int heads, int head_dim,
                       const int (&shape)[3], const int (&box)[3], const int (&steps)[3], TensorMap* result);

// Describes stats of a part of the queries (0 the video, 1 and 2 the global ones before and after it) as the axes
// {W / step, step, H, T, heads of all batches}, of which a copy moves boxes of (t, h, w) rows, w a multiple of 4.
// which: 0 for the LSE, 1 for delta. steps: between the rows of a box.
cudaError_t stats_map(const AttentionStats& stats, int which, int heads, int part, const int (&box)[3],
                      const int (&steps)[3], CUtensorMap* result);

}  // namespace stattn
