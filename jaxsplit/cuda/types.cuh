// Floating-point types of arrays.

struct Half {
  u16 bits;
};
struct Bfloat16 {
  u16 bits;
};
struct Float8 {  // E4M3
  u8 bits;
};
struct Int16 {
  short value;
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
__device__ inline void store(Bfloat16* y, float x) { y->bits = float_to_bfloat16(x); }

// The place of a piece of 16 bytes, so that threads with several pieces each reach all banks of
// shared memory.
__device__ inline int swizzled(int piece) { return piece ^ ((piece >> 3) & 7); }

// Eight neighbors, aligned to their size: loaded now, converted when they are used.
template <class T>
struct Run;

template <>
struct Run<Half> {
  Words words;
  __device__ void load(const Half* x, bool here) {
    words = here ? *(const Words*)x : Words{};
  }
  __device__ float at(int i) const {
    return half_to_float((words.at[i / 2] >> (16 * (i % 2))) & 0xffffu);
  }
};

template <>
struct Run<Bfloat16> {
  Words words;
  __device__ void load(const Bfloat16* x, bool here) {
    words = here ? *(const Words*)x : Words{};
  }
  __device__ float at(int i) const {
    return bits_float(i % 2 ? words.at[i / 2] & 0xffff0000u : words.at[i / 2] << 16);
  }
};

template <>
struct Run<Int8> {
  u32 low, high;
  __device__ void load(const Int8* x, bool here) {
    low = here ? ((const u32*)x)[0] : 0;
    high = here ? ((const u32*)x)[1] : 0;
  }
  __device__ float at(int i) const { return (signed char)((i < 4 ? low : high) >> (8 * (i % 4))); }
};

// What is loaded now and converted when it is used: scales of weights.
__device__ inline u32 load_raw(const Half* p) { return load_raw(&p->bits); }
__device__ inline u32 load_raw(const Int16* p) { return load_raw((const u16*)p); }
__device__ inline u32 load_raw(const Int8* p) { return load_raw((const u8*)p); }
__device__ inline u32 load_raw(const float* p) { return float_bits(*p); }

template <class T>
struct Raw;
template <>
struct Raw<Half> {
  __device__ static float value(u32 raw) { return half_to_float(raw); }
};
template <>
struct Raw<float> {
  __device__ static float value(u32 raw) { return bits_float(raw); }
};
template <>
struct Raw<u8> {
  __device__ static int value(u32 raw) { return (int)raw; }
};
template <>
struct Raw<Int16> {
  __device__ static int value(u32 raw) { return (int)(short)raw; }
};
template <>
struct Raw<Int8> {
  __device__ static int value(u32 raw) { return (int)(signed char)raw; }
};

// As the functions of their names in jaxsplit/quant/scale_codes.py.
__device__ inline float e8m0(u32 raw) {
  return bits_float(raw < 2 ? 0x00200000u << raw : (raw - 1) << 23);
}

__device__ inline float ue4m3(u32 raw) {
  return raw == 127 ? 0 : half_to_float((raw & 127) << 7) * 128;
}

__device__ inline float half_steps(u32 raw, float step) { return ((int)raw + 0.5f) * step; }

__device__ inline int signed_odd(u32 raw) {
  int magnitude = 2 * (int)(raw & 7) + 1;
  return raw > 7 ? -magnitude : magnitude;
}

__device__ inline int signed_4(u32 raw) {
  int magnitude = (int)(raw & 15);
  return raw > 15 ? -magnitude : magnitude;
}
