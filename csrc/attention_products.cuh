// The two matrix products of a consumer warpgroup with a box in shared memory: what the forward and dQ share.
//
// Operands in shared memory are given for their first 16 columns, in chunks of 64. Neither product is waited for.
#pragma once

#include "sm90.cuh"

namespace stattn::attention_fwd {

using namespace sm90;

// A B^T of a slab (64 rows) and a box: S = Q K^T, dP = dO V^T.
template <typename S>
__device__ __forceinline__ void issue_square(float (&result)[S::BN / 2], uint64_t slab, uint64_t box) {
    using Mma = Wgmma<typename S::Element, S::BN>;
    mma_fence();
#pragma unroll
    for (int step = 0; step < S::D / 16; ++step) {
        const uint64_t a = slab + (step / 4 * S::SLAB_CHUNK + step % 4 * 32) / 16;
        const uint64_t b = box + (step / 4 * S::BOX_CHUNK + step % 4 * 32) / 16;
        if (step == 0)
            Mma::first(result, a, b);
        else
            Mma::next(result, a, b);
    }
    mma_commit();
}

// result += W B, of weights in registers and a box: O += P V, dQ += dS K.
template <typename S>
__device__ __forceinline__ void issue_weighted(float (&result)[S::D / 2], const uint32_t (&weights)[S::BN / 16][4],
                                               uint64_t box) {
    mma_fence();
#pragma unroll
    for (int step = 0; step < S::BN / 16; ++step)
        Wgmma<typename S::Element, S::D>::next(result, weights[step], box + step * 2048 / 16);
    mma_commit();
}

}  // namespace stattn::attention_fwd
