// Rotary positions, half-rotation form: the pair (x_j, x_{j + e/2}) turns by its slot's angle.
//
// x         [b, heads, n, e] T, with e = 2 * half
// cos, sin  [r, n, half] float32; r is 1 where all sequences are alike, else b (per_sequence is 1)
// out       [b, heads, n, e] T
// count     b * heads * n * half, the number of pairs
//
// Launch: a thread a pair, THREADS a block. Pairs are counted as the tables lie, so that threads
// next to each other read numbers next to each other.
// Rounding: float32, rounded to T once.

template <typename T>
__global__ void __launch_bounds__(THREADS) rotate(
    const T* __restrict__ x, const float* __restrict__ cos, const float* __restrict__ sin,
    T* __restrict__ out, int heads, int n, int half, int per_sequence, long long count) {
    const long long pair = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (pair >= count) {
        return;
    }
    const int j = pair % half;
    const long long row = pair / half;  // (sequence * heads + head) * n + slot
    const long long sequence = per_sequence ? row / n / heads : 0;
    const long long angle = (sequence * n + row % n) * half + j;
    const long long first = row * 2 * half + j, second = first + half;
    const float a = widen(x[first]), b = widen(x[second]);
    out[first] = narrow<T>(a * cos[angle] - b * sin[angle]);
    out[second] = narrow<T>(b * cos[angle] + a * sin[angle]);
}
