// The host's side of the attention forward: which kernel, which tiles.
#include "attention_fwd.cuh"

#include <algorithm>

#include "attention_launch.h"

namespace stattn {
namespace {

using attention_fwd::attention_forward;
using attention_fwd::attention_merge;
using attention_fwd::Parameters;
using attention_fwd::Shape;

template <typename S>
cudaError_t launch(const AttentionForward& call, cudaStream_t stream) {
    Parameters p{};
    attention_fwd::Launch launch;
    cudaError_t error = attention_fwd::describe<S>(call, &p, &launch);
    if (error == cudaSuccess) error = attention_fwd::allow_shared_memory<attention_forward<S>>(launch.device);
    if (error != cudaSuccess) return error;
    const int blocks = S::PLANNED ? p.tiles : std::min(p.tiles, launch.processors);
    attention_forward<S><<<blocks, S::THREADS, launch.shared, stream>>>(p);
    if constexpr (S::PLANNED) {
        const int64_t merged = int64_t{p.split_tiles} * call.batch * call.heads * S::WARPGROUPS;
        if (merged > INT32_MAX) return cudaErrorInvalidConfiguration;
        using Element = typename S::Element;
        if (merged > 0)
            attention_merge<S><<<static_cast<int>(merged), 128, 0, stream>>>(
                p, static_cast<Element*>(const_cast<void*>(call.out.data)), call.out.batch, call.out.token,
                call.out.head, call.head_dim);
    }
    return cudaGetLastError();
}

// The list of tiles: warpgroups and rows of a key box, by head dimension.
template <typename Element>
cudaError_t choose(const AttentionForward& call, cudaStream_t stream) {
    const int config = call.config + (call.head_dim > 64 ? 0 : 100) + (call.plan ? 10 : 0);
    switch (config) {
        case 0: return launch<Shape<Element, 128, 3, 80, false>>(call, stream);
        case 10: return launch<Shape<Element, 128, 3, 64, true>>(call, stream);
        case 11: return launch<Shape<Element, 128, 3, 80, true>>(call, stream);
        case 100: return launch<Shape<Element, 64, 3, 128, false>>(call, stream);
        case 110: return launch<Shape<Element, 64, 3, 128, true>>(call, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

cudaError_t attention_forward(const AttentionForward& call, cudaStream_t stream) {
    if (call.batch == 0 || call.queries == 0) return cudaSuccess;
    return call.bf16 ? choose<__nv_bfloat16>(call, stream) : choose<__half>(call, stream);
}

}  // namespace stattn
