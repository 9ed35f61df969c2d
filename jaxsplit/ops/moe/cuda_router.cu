// Top-k routing: a warp has a token, each thread every 32nd of its EXPERTS.
//
// ROUTING is an index into those of `MoEConfig`; NORMALIZE and SCALE as there. RMS_PARTS, RMS_SIZE
// and RMS_EPSILON describe a deferred normalization of the logits; 0 parts: there is none.

constexpr int OF_THREAD = (EXPERTS + 31) / 32;
constexpr int SOFTMAX = 0, SIGMOID = 1, SQRT_SOFTPLUS = 2, SOFTMAX_AFTER_TOPK = 3;
constexpr float NOTHING = -3.402823466e38f;  // below every score
constexpr float MIN_SUM = 0.00006103515625f;  // as jaxsplit/ops/moe/router.py

struct Router {
  const float* logits;   // [tokens, EXPERTS]
  const float* bias;     // [EXPERTS], or null
  const float* scale;    // [EXPERTS], or null
  const float* squares;  // [tokens, RMS_PARTS], or null
  const float* logit_bias;  // [EXPERTS], or null: added after the normalization
};

__device__ inline float sum_of_warp(float x) {
  for (int d = 16; d; d /= 2) x += exchange(x, d);
  return x;
}

__device__ inline float largest_of_warp(float x) {
  for (int d = 16; d; d /= 2) {
    float other = exchange(x, d);
    x = other > x ? other : x;
  }
  return x;
}

__device__ inline float score_of(float x) {
  if (ROUTING == SIGMOID) return 1 / (1 + expf(-x));
  if (ROUTING == SQRT_SOFTPLUS) return sqrtf((x > 0 ? x : 0) + log1pf(expf(x > 0 ? -x : x)));
  return x;
}

__device__ inline void select_experts(const Router& router, int* ids, float* weights) {
  int token = blockIdx.x, lane = threadIdx.x;
  float factor = 1;
  if (RMS_PARTS) {
    float squares = 0;
    for (int i = lane; i < RMS_PARTS; i += 32) squares += router.squares[token * RMS_PARTS + i];
    factor = inverse_root(sum_of_warp(squares) / RMS_SIZE + RMS_EPSILON);
  }
  float score[OF_THREAD], order[OF_THREAD], largest = NOTHING;
  float not_a_number = 0;  // comparisons would hide it
#pragma unroll
  for (int i = 0; i < OF_THREAD; i++) {
    int expert = 32 * i + lane;
    bool exists = expert < EXPERTS;
    float x = exists ? router.logits[(long)token * EXPERTS + expert] * factor : NOTHING;
    if (exists && router.logit_bias) x += router.logit_bias[expert];
    if (x != x) not_a_number = x;
    score[i] = exists ? score_of(x) : NOTHING;
    largest = score[i] > largest ? score[i] : largest;
  }
  if (ROUTING == SOFTMAX) {
    float sum = 0;
    largest = largest_of_warp(largest);
#pragma unroll
    for (int i = 0; i < OF_THREAD; i++) {
      score[i] = 32 * i + lane < EXPERTS ? expf(score[i] - largest) : 0;
      sum += score[i];
    }
    sum = sum_of_warp(sum);
#pragma unroll
    for (int i = 0; i < OF_THREAD; i++) score[i] /= sum;
  }
#pragma unroll
  for (int i = 0; i < OF_THREAD; i++) {
    int expert = 32 * i + lane;
    bool exists = expert < EXPERTS;
    order[i] = exists ? score[i] + (router.bias ? router.bias[expert] : 0) : NOTHING;
  }

  // Thread `i` keeps the i-th best.
  int chosen = 0;
  float chosen_score = 0;
  for (int k = 0; k < TOP_K; k++) {
    float best = NOTHING, best_score = 0;
    int id = EXPERTS - 1;
#pragma unroll
    for (int i = 0; i < OF_THREAD; i++) {
      if (order[i] > best) best = order[i], best_score = score[i], id = 32 * i + lane;
    }
    for (int d = 16; d; d /= 2) {
      float other = exchange(best, d), other_score = exchange(best_score, d);
      int other_id = exchange(id, d);
      if (other > best || (other == best && other_id < id)) {
        best = other, best_score = other_score, id = other_id;
      }
    }
#pragma unroll
    for (int i = 0; i < OF_THREAD; i++) {
      if (32 * i + lane == id) order[i] = NOTHING;
    }
    if (lane == k) chosen = id, chosen_score = best_score;
  }

  float weight = lane < TOP_K ? chosen_score : 0;
  if (ROUTING == SOFTMAX_AFTER_TOPK) {
    float most = largest_of_warp(lane < TOP_K ? chosen_score : NOTHING);
    weight = lane < TOP_K ? expf(chosen_score - most) : 0;
    weight /= sum_of_warp(weight);
  }
  if (NORMALIZE) {
    float sum = sum_of_warp(weight);
    weight /= sum > MIN_SUM ? sum : MIN_SUM;
  }
  weight += sum_of_warp(not_a_number);
  if (lane < TOP_K) {
    if (router.scale) weight *= router.scale[chosen];
    ids[token * TOP_K + lane] = chosen;
    weights[token * TOP_K + lane] = weight * SCALE;
  }
}
