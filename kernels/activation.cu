// Gated activations (arXiv 2002.05202): out = activation(gate) * up.
//
//   gate_up [num_tokens, gate | up] T, a row 2 * features wide
//   out     [num_tokens, features] T
//
// features is a multiple of 8. Grid (ceil(num_tokens * features / 2048)), block 256: a thread gives 8 numbers.
//
// softcap: x = cap tanh(x / cap), [len] f32, in place. Grid (ceil(len / 1024)), block 256: a thread has 4 numbers.
// Equals `cpu::softcap` within 5e-7 of the cap.
//
// The gated ones equal `cpu::gated` with `out` rounded to T: the exponential here has an error of a few units of f32, far
// below T's.

#include "common.cuh"

// Both activations are x * sigmoid(t), with t = x for SiLU; (1 + tanh(u)) / 2 is sigmoid(2 u).
struct Silu {
    static __device__ __forceinline__ float argument(float x) { return x; }
};
struct GeluTanh {
    static __device__ __forceinline__ float argument(float x) {
        constexpr float SCALE = 1.595769122f;  // 2 sqrt(2 / pi)
        return x * fmaf(x * x, SCALE * 0.044715f, SCALE);
    }
};

template <class Activation> __device__ __forceinline__ float activate(float x) {
    constexpr float LOG2_E = 1.4426950408889634f;
    return __fdividef(x, 1.0f + exp2_fast(-LOG2_E * Activation::argument(x)));
}

template <class Activation, class T>
__device__ __forceinline__ void gated(T* out, const T* gate_up, int num_tokens, int features) {
    const u64 i = (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (i >= static_cast<u64>(num_tokens) * features) return;
    const u64 row = i / features;
    const T* source = gate_up + i + row * features;
    Eight gate = load8(source);
    const Eight up = load8(source + features);
#pragma unroll
    for (int j = 0; j < 8; j++) gate.at[j] = activate<Activation>(gate.at[j]) * up.at[j];
    store8(out + i, gate);
}

#define ACTIVATION_KERNEL(name, Activation, T)                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
    name##_##T(T* out, const T* gate_up, int num_tokens, int features) {                                               \
        gated<Activation>(out, gate_up, num_tokens, features);                                                         \
    }

extern "C" __global__ void __launch_bounds__(256) softcap(float* x, u64 len, float cap) {
    const u64 i = (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    const float scale = __fdiv_rn(TANH_SCALE, cap);
    const auto capped = [=](float number) { return __fmul_rn(tanh_scaled(__fmul_rn(number, scale)), cap); };
    if (i + 4 <= len) {
        const float4 all = load4(x + i);
        store4(x + i, make_float4(capped(all.x), capped(all.y), capped(all.z), capped(all.w)));
    } else {
        for (u64 at = i; at < len; at++) x[at] = capped(x[at]);
    }
}

ACTIVATION_KERNEL(silu, Silu, bf16)
ACTIVATION_KERNEL(silu, Silu, f16)
ACTIVATION_KERNEL(gelu_tanh, GeluTanh, bf16)
ACTIVATION_KERNEL(gelu_tanh, GeluTanh, f16)
