// RMSNorm of rows: out = x / sqrt(mean(x^2) + eps) * weight.
//
// x       [rows, d] T
// weight  [d] T
// out     [rows, d] T
//
// Launch: a block a row, of whole warps, at most THREADS threads. Thread t takes channels t,
// t + blockDim.x, and so on, so that d may be any length.
// Rounding: the statistic is float32; the normed number is rounded to T, and so is its product with
// the weight.

// sqrt(mean(x^2) + eps) of a row, in every thread of the block. parts: see block_sum.
template <typename T>
__device__ inline float root_mean_square(const T* row, int d, float eps, float* parts) {
    float sum = 0.0f;
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
        const float x = widen(row[c]);
        sum += x * x;
    }
    return sqrtf(block_sum(sum, parts) / d + eps);
}

// One channel of the norm.
template <typename T>
__device__ inline T normed(T x, float root, T weight) {
    return narrow<T>(rounded<T>(widen(x) / root) * widen(weight));
}

template <typename T>
__global__ void __launch_bounds__(THREADS) rms_norm(
    const T* __restrict__ x, const T* __restrict__ weight, T* __restrict__ out, int d, float eps) {
    SHARED(float, parts, WARP);
    const long long first = static_cast<long long>(blockIdx.x) * d;
    const float root = root_mean_square(x + first, d, eps, parts);
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
        out[first + c] = normed(x[first + c], root, weight[c]);
    }
}
