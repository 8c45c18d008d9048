// The host's side of the attention forward: which kernel, which tiles.
#include "attention_fwd.cuh"

#include <algorithm>

#include "attention_frames.cuh"
#include "attention_launch.h"

namespace stattn {
namespace {

using attention_fwd::attention_forward;
using attention_fwd::Parameters;
using attention_fwd::Shape;

// Lets a launch read the plan for the slots of a ring cache.
cudaError_t place(const AttentionForward& call, Parameters* p, int warpgroups, cudaStream_t stream) {
    constexpr int MOST_FRAMES = 8192;  // of which shared memory holds the slots
    if (call.grid_frames > MOST_FRAMES || p->plan == nullptr) return cudaErrorInvalidValue;
    cudaError_t error =
        cudaMemcpyAsync(call.placed_plan, p->plan, call.plan_size * sizeof(int), cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return error;
    const attention_fwd::PlaceParameters places{call.placed_plan,  call.frames,     call.plan->k_shape[0], call.grid_frames, p->heads,
                                                p->tiles_per_head, p->line_tiles, p->line_record,        warpgroups};
    const int64_t blocks = int64_t{p->heads} * p->tiles_per_head + p->line_tiles;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    attention_fwd::place_frames<<<static_cast<int>(blocks), attention_fwd::PLACERS, call.grid_frames * sizeof(int), stream>>>(
        places);
    p->plan = call.placed_plan;
    return cudaGetLastError();
}

template <typename S>
cudaError_t launch(const AttentionForward& call, cudaStream_t stream) {
    Parameters p{};
    attention_fwd::Launch launch;
    cudaError_t error = attention_fwd::describe<S>(call, &p, &launch);
    if (error == cudaSuccess) error = attention_fwd::allow_shared_memory<attention_forward<S>>(launch.device);
    if (error == cudaSuccess && call.frames) error = place(call, &p, S::WARPGROUPS, stream);
    const size_t tiles = size_t(call.batch) * call.heads * p.split_tiles;  // in pieces
    if (error == cudaSuccess && tiles > 0)
        error = cudaMemsetAsync(p.arrived, 0, tiles * S::WARPGROUPS * sizeof(int), stream);
    if (error != cudaSuccess) return error;
    const int blocks = S::PLANNED ? p.tiles : std::min(p.tiles, launch.processors);
    attention_forward<S><<<blocks, S::THREADS, launch.shared, stream>>>(p);
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
