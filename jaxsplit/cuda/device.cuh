// What kernels use of the GPU beside C++: loads, conversions, exchanges between threads.
// Without includes, since NVRTC's packages have no headers.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

struct alignas(16) Words {
  u32 at[4];
};

// Until the kernels before this one have ended, of which one may launch it earlier (PTX ISA,
// `griddepcontrol`).
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Loads of weights, which are read once. In order: the compiler moves no such load across another.
#if __CUDA_ARCH__ >= 700
#define ONCE ".L1::no_allocate"
#else
#define ONCE ""
#endif

__device__ inline Words load_words(const void* p) {
  Words y;
  asm volatile("ld.global.nc" ONCE ".v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(y.at[0]), "=r"(y.at[1]), "=r"(y.at[2]), "=r"(y.at[3])
               : "l"(p));
  return y;
}

__device__ inline u32 load_word(const void* p) {
  u32 y;
  asm volatile("ld.global.nc" ONCE ".u32 %0, [%1];" : "=r"(y) : "l"(p));
  return y;
}

__device__ inline u32 load_raw(const u16* p) {
  u16 y;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(y) : "l"(p));
  return y;
}

__device__ inline u32 load_raw(const u8* p) {
  u32 y;
  asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(y) : "l"(p));
  return y;
}

__device__ inline float half_to_float(u32 bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((u16)bits));
  return y;
}

__device__ inline u16 float_to_half(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

__device__ inline u32 float_bits(float x) { return __float_as_uint(x); }

__device__ inline u16 float_to_bfloat16(float x) {
  u32 bits = float_bits(x);
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return nan ? 0x7fc0 : (u16)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// Two neighbors, rounded to nearest: the first in the lower half.
struct Half;
struct Bfloat16;
struct Float8;
template <class T>
__device__ inline u32 pack(float first, float second);

#if __CUDA_ARCH__ >= 800

template <>
__device__ inline u32 pack<Half>(float first, float second) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
}

template <>
__device__ inline u32 pack<Bfloat16>(float first, float second) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
}

#else

template <>
__device__ inline u32 pack<Half>(float first, float second) {
  return float_to_half(first) | (u32)float_to_half(second) << 16;
}

template <>
__device__ inline u32 pack<Bfloat16>(float first, float second) {
  return float_to_bfloat16(first) | (u32)float_to_bfloat16(second) << 16;
}

#endif

#if __CUDA_ARCH__ >= 890

// The largest number instead of larger ones.
template <>
__device__ inline u32 pack<Float8>(float first, float second) {
  u16 y;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(second), "f"(first));
  return y;
}

#endif

__device__ inline int dot4(u32 a, u32 b, int c) { return __dp4a((int)a, (int)b, c); }

__device__ inline float exchange(float x, int distance) {
  return __shfl_xor_sync(0xffffffffu, x, distance);
}

__device__ inline u32 exchange(u32 x, int distance) {
  return __shfl_xor_sync(0xffffffffu, x, distance);
}

__device__ inline int exchange(int x, int distance) {
  return __shfl_xor_sync(0xffffffffu, x, distance);
}

// What a thread of the quad has.
__device__ inline u32 from_quad(u32 x, int member) { return __shfl_sync(0xffffffffu, x, member, 4); }

// Bytes of `low` and `high`, numbered 0 to 7, by the four lowest hexadecimal digits of `which`, all
// of them below 8: `__byte_perm` would mask them first.
__device__ inline u32 pick_bytes(u32 low, u32 high, u32 which) {
  u32 y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(low), "r"(high), "r"(which));
  return y;
}

// Each byte full of its top bit.
__device__ inline u32 fill_bytes(u32 x) {
  u32 y;
  asm("prmt.b32 %0, %1, %1, 0xba98;" : "=r"(y) : "r"(x));
  return y;
}

// What threads of the warp have written to shared memory can then be read by the others.
__device__ inline void wait_for_warp() { __syncwarp(); }

// Adds to a number in shared memory, to which other threads add, too.
__device__ inline void add_to_shared(int* p, int x) { atomicAdd(p, x); }

// Of a thread; the compiler knows that it is the same for all threads of a warp. All of them call it
// together.
__device__ inline int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// Products of 16 x 16 and 16 x 32 codes with 8 columns of as many on tensor cores, added to `start`
// (PTX ISA, "Matrix Fragments for mma.m16n8k32"). A quad has a row, and the row eight below, of `a`:
// words of 4 codes, row by row; and a column of `b`. Thread `i` of it gets the products with columns
// 2 i and 2 i + 1, row by row.
#if __CUDA_ARCH__ >= 800

__device__ inline void multiply_16(int* y, const u32* a, u32 b, int start) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%7, %7, %7, %7};"
      : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
      : "r"(a[0]), "r"(a[1]), "r"(b), "r"(start));
}

__device__ inline void multiply_32(int* y, const u32* a, const u32* b, int start) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %10, %10, %10};"
      : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(start));
}

#elif __CUDA_ARCH__ >= 750

__device__ inline void multiply_8(int* y, u32 a, u32 b, int c0, int c1) {
  asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
      : "=r"(y[0]), "=r"(y[1])
      : "r"(a), "r"(b), "r"(c0), "r"(c1));
}

__device__ inline void multiply_16(int* y, const u32* a, u32 b, int start) {
  multiply_8(y, a[0], b, start, start);
  multiply_8(y + 2, a[1], b, start, start);
}

__device__ inline void multiply_32(int* y, const u32* a, const u32* b, int start) {
  multiply_16(y, a, b[0], start);
  multiply_8(y, a[2], b[1], y[0], y[1]);
  multiply_8(y + 2, a[3], b[1], y[2], y[3]);
}

#endif

// A constant that is kept in a register: the assembler, too, must not know it.
__device__ inline u32 in_register(u32 x) {
  u32 earlier;  // lanes: the last is none of them
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(earlier));
  return x + (earlier >> 31);
}

__device__ inline float bits_float(u32 bits) { return __uint_as_float(bits); }

// Of a block; as many bytes as its launch says.
extern __shared__ __align__(1024) char dynamic_shared[];

// Where something is in shared memory: the compiler adds offsets to it within instructions.
typedef u32 SharedAddress;
__device__ inline SharedAddress shared_address(const void* p) {
  return (u32)__cvta_generic_to_shared(p);
}

#if __CUDA_ARCH__ >= 800

// Copies 4, 8 or 16 bytes to shared memory, without waiting for them; `end_group` ends a group of
// copies.
template <int BYTES>
__device__ inline void start_copy(void* to, const void* from) {
  if (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from),
                 "n"(BYTES)
                 : "memory");
  }
}

// 16 bytes; zeros if there is nothing to copy.
__device__ inline void start_copy_or_zeros(SharedAddress to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}

__device__ inline void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most some of the newest groups of the thread are under way. The threads of the block then
// wait for one another before they read what others have copied.
template <int NEWEST>
__device__ inline void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
}

// What the thread's copies wrote, to instructions that read shared memory on their own.
__device__ inline void publish_copies() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#endif

#if __CUDA_ARCH__ >= 750

// A half of a word, twice: the compiler makes it part of the instruction that reads it.
__device__ inline u32 both_lower(u32 x) {
  u32 y;
  asm("{ .reg .b16 lower, upper; mov.b32 {lower, upper}, %1; mov.b32 %0, {lower, lower}; }"
      : "=r"(y)
      : "r"(x));
  return y;
}

__device__ inline u32 both_upper(u32 x) {
  u32 y;
  asm("{ .reg .b16 lower, upper; mov.b32 {lower, upper}, %1; mov.b32 %0, {upper, upper}; }"
      : "=r"(y)
      : "r"(x));
  return y;
}

// Two neighbors in 16 bits each: a * b + c, rounded once.
template <class T>
__device__ inline u32 multiply_add_pairs(u32 a, u32 b, u32 c);

template <>
__device__ inline u32 multiply_add_pairs<Half>(u32 a, u32 b, u32 c) {
  u32 y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ inline u32 multiply_add_pairs<Bfloat16>(u32 a, u32 b, u32 c) {
  u32 y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}
#endif

// Four matrices of 8 rows, 16 bytes each, whose addresses the threads have: those of the first in
// the first eight. Thread `i` of a quad gets word `i` of the quad's row in each.
__device__ inline void load_matrices(u32* y, SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
               : "r"(row)
               : "memory");
}

// The same matrices of 16-bit numbers, transposed: of the quad's column, those in rows `2 i` and
// `2 i + 1`.
__device__ inline void load_transposed(u32* y, SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
               : "r"(row)
               : "memory");
}

// Adds the products of 16 rows of 16 numbers with 8 columns (PTX ISA, "Matrix Fragments for
// mma.m16n8k16 with floating point type"). A quad has words of its row, of the row eight below, and
// of both eight numbers later; and of a column. Results as those of `multiply_16`.
template <class T>
__device__ inline void multiply_add(float* y, const u32* a, const u32* b);

#define MULTIPLY_ADD(T, NAME)                                                                      \
  template <>                                                                                      \
  __device__ inline void multiply_add<T>(float* y, const u32* a, const u32* b) {                   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, "  \
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                   \
                 : "+f"(y[0]), "+f"(y[1]), "+f"(y[2]), "+f"(y[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));              \
  }
#if __CUDA_ARCH__ >= 800
MULTIPLY_ADD(Half, "f16")
MULTIPLY_ADD(Bfloat16, "bf16")
#else
template <>
__device__ inline void multiply_add<Half>(float* y, const u32* a, const u32* b) {
  for (int i = 0; i < 2; i++) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(y[0]), "+f"(y[1]), "+f"(y[2]), "+f"(y[3])
                 : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
  }
}
#endif

#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Products of warpgroups (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"): between a
// fence and `end_products`, registers are theirs until they are waited for.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int NEWEST>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(NEWEST) : "memory");
}

// Describes columns of 128 bytes in shared memory, aligned to 1024 bytes, whose pieces of 16 bytes
// are swizzled; groups of eight columns are 1024 bytes apart.
__device__ inline unsigned long long columns_at(const void* p) {
  unsigned long long address = shared_address(p) & 0x3ffff;
  return address >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

__device__ inline unsigned long long columns_after(unsigned long long columns, int bytes) {
  return columns + bytes / 16;
}

// Threads that arrive, and bytes of copies in shared memory (PTX ISA, "mbarrier"): a turn ends when
// `count` threads and all bytes that they expect have arrived.
typedef unsigned long long Arrivals;

__device__ inline void start_arrivals(Arrivals* p, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(p)), "r"(count)
               : "memory");
}

// Before other threads and copies know of them.
__device__ inline void publish_arrivals() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void arrive(Arrivals* p) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(p)) : "memory");
}

// Arrives, and expects bytes.
__device__ inline void expect_bytes(Arrivals* p, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(p)),
               "r"(bytes)
               : "memory");
}

// Copies a multiple of 16 bytes to shared memory.
__device__ inline void copy_bytes(void* to, const void* from, int bytes, Arrivals* p) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(p))
      : "memory");
}

// Until a turn of this parity, the first being 0, has ended: the newest one that has, or the next.
__device__ inline void wait_for_arrivals(Arrivals* p, u32 parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(shared_address(p)),
      "r"(parity)
      : "memory");
}

#else

typedef unsigned long long Arrivals;
__device__ inline void start_arrivals(Arrivals*, int) {}
__device__ inline void publish_arrivals() {}
__device__ inline void arrive(Arrivals*) {}
__device__ inline void expect_bytes(Arrivals*, int) {}
__device__ inline void copy_bytes(void*, const void*, int, Arrivals*) {}
__device__ inline void wait_for_arrivals(Arrivals*, u32) {}

__device__ inline void begin_products() {}
__device__ inline void end_products() {}
template <int NEWEST>
__device__ inline void wait_for_products() {}

#endif

// What other blocks have written before their fence.
__device__ inline float fresh(const float* p) { return *(const volatile float*)p; }

__device__ inline void fence() { __threadfence(); }

__device__ inline int atomic_add(int* p, int x) { return atomicAdd(p, x); }

// To the nearest, half to even.
__device__ inline int round_to_int(float x) { return __float2int_rn(x); }

__device__ inline float inverse_root(float x) { return rsqrtf(x); }

// 2 to the x; 0 instead of subnormal numbers.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
