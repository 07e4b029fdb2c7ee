// The SwiGLU product: out = silu(gate) * up, with silu(y) = y * sigmoid(y).
//
// gate, up  [count] T, of any shape
// out       [count] T
//
// Launch: a thread a number, THREADS a block.
// Rounding: silu(gate) is rounded to T, and so is the product.

template <typename T>
__global__ void __launch_bounds__(THREADS) silu_product(
    const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ out, long long count) {
    const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) {
        const float y = widen(gate[i]);
        out[i] = narrow<T>(rounded<T>(y * sigmoid(y)) * widen(up[i]));
    }
}
