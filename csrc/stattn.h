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

// A tensor [B, N, heads, D] with unit last stride; the strides are in elements.
struct Strided {
    const void* data;
    int64_t batch, token, head;
};

// csrc/attention_fwd.cu: out = softmax(scale q k^T) v for every head, and the natural-log LSE of its rows. Addresses and
// strides are multiples of 16 bytes, scale is positive, there is at least one key. config: an entry of the file's list.
//
// Without a plan every query sees every key. With one (csrc/attention_fwd.h), tokens are those of boxes (t, h, w), and a
// tile of queries is one slab of at most 64 tokens for each warpgroup, side by side on the axis `stacked`. The tokens of
// slabs and key boxes lie `steps` apart on each axis, at most 8 where there is more than one.
struct AttentionPlan {
    const int32_t* data;
    int q_shape[3], k_shape[3], slab[3], box[3], steps[3];
    int stacked, tiles;  // tiles: of each head
    // Global tokens before and after the video, whether q holds them too, and its tiles of them.
    int before, after, q_globals, line_tiles, line_record;
    const uint8_t* valid;  // [B, before + after], which of them are real; or null
};
struct AttentionForward {
    Strided q, k, v, out;
    float* lse;  // [B, heads, queries]
    int batch, heads, key_heads, head_dim, queries, keys;
    float scale;
    bool bf16;  // else fp16
    int config;
    const AttentionPlan* plan;  // or null
};
cudaError_t attention_forward(const AttentionForward& call, cudaStream_t stream);

}  // namespace stattn
