// The host's side of dQ: which kernel, which tiles, which tensor maps beside those of the forward.
#include "attention_bwd_dq.cuh"

#include "attention_launch.h"

namespace stattn {
namespace {

using attention_bwd::attention_dq;
using attention_bwd::DqParameters;
using attention_bwd::DqShape;
using attention_fwd::behind;

cudaError_t map_dout(const AttentionForward& like, const Strided& dout, DqParameters* p) {
    const int slab[3] = {1, 1, attention_fwd::ROWS}, steps[3] = {1, 1, 1};
    cudaError_t error = attention_fwd::map_for(like, behind(dout, p->q_first), like.heads, p->q_shape, p->slab, p->steps,
                                               &p->dout_map, &p->dout_x);
    attention_fwd::Heads places;  // those of the video
    for (int side = 0; side < 2 && p->globals > 0; ++side) {
        const int tokens = side == 0 ? p->before : p->after;
        if (tokens == 0 || error != cudaSuccess) continue;
        const int shape[3] = {1, 1, tokens}, first = side == 0 ? 0 : like.queries - tokens;
        error = attention_fwd::map_for(like, behind(dout, first), like.heads, shape, slab, steps, &p->dout_line[side],
                                       &places);
    }
    return error;
}

template <typename S>
cudaError_t launch(const AttentionBackward& call, cudaStream_t stream) {
    const AttentionForward like{call.q,    call.k,         call.v,        call.dq,      nullptr,   call.batch,
                                call.heads, call.key_heads, call.head_dim, call.queries, call.keys, call.scale,
                                call.bf16,  call.config,    call.plan};
    DqParameters p{};
    attention_fwd::Launch launch;
    cudaError_t error = attention_fwd::describe<S>(like, &p, &launch);
    if (error == cudaSuccess) error = map_dout(like, call.dout, &p);
    if (error == cudaSuccess) error = attention_fwd::allow_shared_memory<attention_dq<S>>(launch.device);
    if (error != cudaSuccess) return error;
    p.stats = call.stats.data;
    p.places = attention_bwd::StatsPlaces(call.stats);
    p.of_delta = call.stats.rows() * call.batch * call.heads;
    p.scale = call.scale;
    p.together = {*call.plan, int64_t{call.keys} * S::D * 4, launch.processors};
    attention_dq<S><<<p.tiles, S::THREADS, launch.shared, stream>>>(p);
    return cudaGetLastError();
}

// Whether there is shared memory for a bit for each global token, where a call says which are real.
template <typename S>
bool fits(const AttentionPlan& plan) {
    const int rows = plan.box[0] * plan.box[1] * plan.box[2];
    const int boxes = (plan.before + rows - 1) / rows + (plan.after + rows - 1) / rows + 1;
    return !plan.valid || S::LAUNCHED + boxes * ((S::BN + 31) / 32) * 4 <= attention_fwd::SHARED_LIMIT;
}

// The list of tiles: warpgroups, rows of a key box and stages, by head dimension.
template <typename Element>
cudaError_t choose(const AttentionBackward& call, cudaStream_t stream) {
    switch (call.config + (call.head_dim > 64 ? 0 : 100)) {
        case 0:
            if (fits<DqShape<Element, 128, 3, 64, 4>>(*call.plan))
                return launch<DqShape<Element, 128, 3, 64, 4>>(call, stream);
            return launch<DqShape<Element, 128, 3, 64, 2>>(call, stream);
        case 100: return launch<DqShape<Element, 64, 3, 64, 4>>(call, stream);
        case 101: return launch<DqShape<Element, 64, 3, 96, 4>>(call, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

cudaError_t attention_backward_dq(const AttentionBackward& call, cudaStream_t stream) {
    if (call.batch == 0 || call.queries == 0) return cudaSuccess;
    if (!call.plan) return cudaErrorInvalidValue;
    return call.bf16 ? choose<__nv_bfloat16>(call, stream) : choose<__half>(call, stream);
}

}  // namespace stattn
