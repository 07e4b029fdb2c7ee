// The gated update of the global memory and its adapter, in one pass a slot:
//
//     candidate = rms_norm(R')
//     g         = min(1, sigmoid(W_g [candidate ; S] + b_g) / saturation)
//     S'        = g S + (1 - g) candidate, or the candidate on the first chunk; S where none closes
//     G'        = S' + A_up (A_down S')
//
// state, readout      [b, m, d] T: S, read only where has_state is 1 or closes is 0; and R'
// norm                [d] T
// gate                [1, 2 d] T
// bias                [1] T, or [d] for a vector gate; read only where has_bias is 1
// down, up            [rank, d] and [d, rank] T, rank at most MAX_RANK
// has_state, closes   [r, 1] int64, 0 or 1; r is 1 where all sequences are alike, else b
//                     (per_sequence is 1)
// new_state, memory   [b, m, d] T: S' and G'
//
// update_global is for the scalar gate, one number a slot. The vector gate's product is as large as
// a layer's projections, and a library's matrix product does it better: blend_global takes
// candidate [b, m, d] and logits = W_g [candidate ; S], [b, m, d] T, and does the rest.
//
// Launch: a block a slot, b * m of them, of whole warps, at most THREADS threads. Thread t takes
// channels t, t + blockDim.x, and so on; of the adapter's low rank a warp takes a row at a time.
// Rounding: the candidate as in rms_norm; from there float32, and S' and G' are rounded once each.
// G' is read from the rounded S', as it is when S' comes back from memory.

constexpr int MAX_RANK = 64;

// g, before has_state.
__device__ inline float share_kept(float logit, float saturation) {
    return fminf(1.0f, sigmoid(logit) / saturation);
}

// G' of a slot. state has been written by this block, a channel by the thread that has it here.
// low: shared, [MAX_RANK].
template <typename T>
__device__ inline void adapt(
    const T* state, const T* down, const T* up, T* memory, int d, int rank, float* low) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    __syncthreads();  // a warp reads channels that other warps have written
    for (int j = warp; j < rank; j += blockDim.x / WARP) {
        float sum = 0.0f;
        for (int c = lane; c < d; c += WARP) {
            sum += widen(down[static_cast<long long>(j) * d + c]) * widen(state[c]);
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            low[j] = sum;
        }
    }
    __syncthreads();  // and a channel needs the sums of all warps
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
        float sum = 0.0f;
        for (int j = 0; j < rank; ++j) {
            sum += widen(up[static_cast<long long>(c) * rank + j]) * low[j];
        }
        memory[c] = narrow<T>(widen(state[c]) + sum);
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS) update_global(
    const T* __restrict__ state, const T* __restrict__ readout, const T* __restrict__ norm,
    const T* __restrict__ gate, const T* __restrict__ bias, const T* __restrict__ down,
    const T* __restrict__ up, const long long* __restrict__ has_state,
    const long long* __restrict__ closes, T* new_state, T* __restrict__ memory, int m, int d,
    int rank, int has_bias, int per_sequence, float eps, float saturation) {
    SHARED(float, square_parts, WARP);
    SHARED(float, gate_parts, WARP);
    SHARED(float, low, MAX_RANK);
    const int sequence = per_sequence ? blockIdx.x / m : 0;
    const bool keeps = has_state[sequence] != 0, closing = closes[sequence] != 0;
    const long long first = static_cast<long long>(blockIdx.x) * d;
    const float root = root_mean_square(readout + first, d, eps, square_parts);
    float logit = 0.0f;
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
        logit += widen(gate[c]) * widen(normed(readout[first + c], root, norm[c]));
        logit += keeps ? widen(gate[d + c]) * widen(state[first + c]) : 0.0f;
    }
    logit = block_sum(logit, gate_parts) + (has_bias ? widen(bias[0]) : 0.0f);
    const float g = keeps ? share_kept(logit, saturation) : 0.0f;
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
        const float old = keeps || !closing ? widen(state[first + c]) : 0.0f;
        const float candidate = widen(normed(readout[first + c], root, norm[c]));
        new_state[first + c] = narrow<T>(closing ? g * old + (1.0f - g) * candidate : old);
    }
    adapt(new_state + first, down, up, memory + first, d, rank, low);
}

template <typename T>
__global__ void __launch_bounds__(THREADS) blend_global(
    const T* __restrict__ state, const T* __restrict__ candidate, const T* __restrict__ logits,
    const T* __restrict__ bias, const T* __restrict__ down, const T* __restrict__ up,
    const long long* __restrict__ has_state, const long long* __restrict__ closes, T* new_state,
    T* __restrict__ memory, int m, int d, int rank, int has_bias, int per_sequence,
    float saturation) {
    SHARED(float, low, MAX_RANK);
    const int sequence = per_sequence ? blockIdx.x / m : 0;
    const bool keeps = has_state[sequence] != 0, closing = closes[sequence] != 0;
    const long long first = static_cast<long long>(blockIdx.x) * d;
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
        const float logit = widen(logits[first + c]) + (has_bias ? widen(bias[c]) : 0.0f);
        const float g = keeps ? share_kept(logit, saturation) : 0.0f;
        const float old = keeps || !closing ? widen(state[first + c]) : 0.0f;
        const float blend = g * old + (1.0f - g) * widen(candidate[first + c]);
        new_state[first + c] = narrow<T>(closing ? blend : old);
    }
    adapt(new_state + first, down, up, memory + first, d, rank, low);
}
