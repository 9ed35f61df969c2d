// Floating-point types of arrays.

struct Half {
  u16 bits;
};
struct Bfloat16 {
  u16 bits;
};
struct Int8 {
  signed char value;
};

__device__ inline float load(const float* x) { return *x; }
__device__ inline float load(const Half* x) { return half_to_float(x->bits); }
__device__ inline float load(const Int8* x) { return x->value; }
__device__ inline float load(const Bfloat16* x) { return bits_float((u32)x->bits << 16); }

__device__ inline void store(float* y, float x) { *y = x; }
__device__ inline void store(Half* y, float x) { y->bits = float_to_half(x); }
__device__ inline void store(Bfloat16* y, float x) {
  u32 bits = float_bits(x);
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  y->bits = nan ? 0x7fc0 : (u16)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// Eight neighbors, aligned to their size.
__device__ inline void load8(const Half* x, float* y) {
  Words words = *(const Words*)x;
  for (int i = 0; i < 8; i++) y[i] = half_to_float((words.at[i / 2] >> (16 * (i % 2))) & 0xffffu);
}
__device__ inline void load8(const Bfloat16* x, float* y) {
  Words words = *(const Words*)x;
  for (int i = 0; i < 8; i++) {
    y[i] = bits_float(i % 2 ? words.at[i / 2] & 0xffff0000u : words.at[i / 2] << 16);
  }
}
__device__ inline void load8(const Int8* x, float* y) {
  u32 low = ((const u32*)x)[0], high = ((const u32*)x)[1];
  for (int i = 0; i < 8; i++) y[i] = (signed char)((i < 4 ? low : high) >> (8 * (i % 4)));
}
