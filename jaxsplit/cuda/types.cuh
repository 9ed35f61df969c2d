// Floating-point types of arrays.

struct Half {
  u16 bits;
};
struct Bfloat16 {
  u16 bits;
};

__device__ inline float load(const float* x) { return *x; }
__device__ inline float load(const Half* x) { return half_to_float(x->bits); }
__device__ inline float load(const Bfloat16* x) { return bits_float((u32)x->bits << 16); }

__device__ inline void store(float* y, float x) { *y = x; }
__device__ inline void store(Half* y, float x) { y->bits = float_to_half(x); }
__device__ inline void store(Bfloat16* y, float x) {
  u32 bits = float_bits(x);
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  y->bits = nan ? 0x7fc0 : (u16)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
