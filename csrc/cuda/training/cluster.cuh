// Fused training of a perceptron with one hidden layer: all steps of a call in one launch, by one cluster of blocks, which
// keeps the network. What a step computes: cpu/training/plan.h.
//
// Contract
//   Hopper (sm_90). float; samples are bytes, at most 800 features; at most 8 hidden units for each block of the cluster,
//   16 outputs, 64 rows in a mini-batch. Every activation, loss and rule, classes or values as targets, dropout, weights of
//   samples; no moving averages, no noise. Parameters, Progress: step.cuh; Objective: loss.cuh.
//   Three launches: arrange_samples, train_in_cluster, close_steps, each of the same steps, which begin at Progress::next.
//   A block owns 8 hidden units: their weights and biases, the rows of the last layer's weights that belong to them, and
//   the optimizer's states of all these never leave its registers. Every block updates the last layer's biases alike.
//   Matmuls with samples run on tensor cores: bytes are exact in bfloat16, and so is a float as the sum of three of
//   them. Products are exact, then, and sums are in float, as tensor cores add: over the features in steps of 16, each
//   warp its own, then over the warps. What a byte counts, 1/255 and the factor of dropout, is multiplied to sums of the first
//   layer's inputs, and to the gradients that samples are multiplied by. A parameter or gradient of 2^127 or more counts as
//   infinite.
//   Sums over the mini-batch are over the rows in steps of 16 for the first layer's weights, and of every eighth row first
//   for the other parameters. Everything has a fixed order: the same bits on every run, also if the steps are divided.
// Dynamic shared memory: cluster_memory_bytes, and twice a mini-batch.
#pragma once

#include "cuda/training/draw.cuh"
#include "cuda/training/loss.cuh"

namespace gemmlet {

inline constexpr int cluster_threads = 256, cluster_warps = cluster_threads / 32;
// Rows of a mini-batch, with those that are not there, and each block's hidden units: what warps and fragments take.
inline constexpr int cluster_rows = 64, cluster_units = 8;
inline constexpr int max_cluster_outputs = 16;
// Features go in steps of 16, of which every eighth one is a warp's.
inline constexpr int max_warp_steps = 7;

// A mini-batch as tensor cores take it: bfloat16, 8 features of 64 rows after the other.
inline constexpr int tile_features = 8, tile_numbers = cluster_rows * tile_features;
__host__ __device__ __forceinline__ constexpr int feature_steps(int features) { return (features + 15) / 16; }

//
// Samples
//

struct ArrangeSamples {
  const unsigned char* samples;
  int features;
  const Index* indices;  // the classes of all samples, or null
  const Progress* progress;
  int rows;
  bfloat16* tiles;     // of each step
  int* labels;         // of each row of each step
  float* weights;      // the same of what they count; or null
  Drops<float> drops;  // of the samples, of which those that are kept stay as they are
};

// The mini-batches of some steps. A thread takes 8 features of a row; two rows are side by side, so that 32 bytes are
// written together. Grid: as many threads as there are such pieces in a step, and the steps.
template <int threads>
__global__ void __launch_bounds__(threads) arrange_samples(const __grid_constant__ ArrangeSamples p) {
  const int tiles = 2 * feature_steps(p.features);
  const int n = static_cast<int>(blockIdx.x) * threads + static_cast<int>(threadIdx.x);
  if (n >= tiles * cluster_rows) return;
  const int tile = n % (2 * tiles) / 2, i = n / (2 * tiles) * 2 + n % 2;
  const Index step = blockIdx.y;
  Pack<bfloat16, tile_features> pack = {};
  if (i < p.rows) {
    const Index sample = p.progress->order[(p.progress->next + step) * p.progress->batch + i];
    const int count = min(tile_features, p.features - tile * tile_features);
    const unsigned char* const from = p.samples + sample * p.features + tile * tile_features;
    Pack<unsigned char, tile_features> bytes = {};
    if (count == tile_features && reinterpret_cast<unsigned long long>(from) % tile_features == 0)
      bytes = load_pack<tile_features>(from);
    else
      for (int k = 0; k < count; ++k) bytes.value[k] = from[k];
#pragma unroll
    for (int k = 0; k < tile_features; ++k) pack.value[k] = narrow<bfloat16>(static_cast<float>(bytes.value[k]));
    if (p.drops.keep != 0) {
#pragma unroll
      for (int first = 0; first < tile_features; first += 4) {
        const unsigned kept =
            p.drops.kept<4>(i, tile * tile_features + first, p.drops.draw.template step<true>() + step);
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if ((kept >> k & 1) == 0) pack.value[first + k] = {};
      }
    }
    if (tile == 0 && p.indices != nullptr) p.labels[step * p.rows + i] = static_cast<int>(p.indices[sample]);
    if (tile == 0 && p.weights != nullptr)
      p.weights[step * p.rows + i] =
          static_cast<float>(p.progress->weights[(p.progress->next + step) * p.progress->batch + i]);
  }
  store_pack(p.tiles + ((step * tiles + tile) * cluster_rows + i) * tile_features, pack);
}

//
// Training
//

struct ClusterTraining {
  Progress* progress;
  const bfloat16* tiles;
  int rows, features, hidden, out;
  float *first, *last;  // the parameters of both layers
  Index plane;
  Activation<float> hidden_activation, activation;
  float scale;         // what a byte of the samples counts
  Drops<float> drops;  // of the units
  // Its labels, weights, losses and correct are those of the first step, with those of the others behind them.
  Objective<float> objective;
  bool decays_biases;
};

// Rows of 20 numbers begin in other banks, eight of them together in all.
inline constexpr int cluster_stride = 20;

template <int Ranks>
struct alignas(16) ClusterMemory {
  static_assert(Ranks % 2 == 0 && cluster_rows % Ranks == 0);
  static constexpr int rows_of_block = cluster_rows / Ranks;
  // Of each warp. First the sums that others hand it for its 8 rows; then (OfWarp) what it makes of them.
  unsigned char of_warps[cluster_warps][cluster_warps * 32 * 2 * sizeof(float)];
  float grad[cluster_rows][cluster_stride];  // of the outputs' preactivations; behind them a 1
  float weight[cluster_units][cluster_stride];
  float bias[cluster_units], last_bias[max_cluster_outputs];
  // What each block of the cluster adds to the outputs of this one's rows.
  float parts[Ranks][rows_of_block][max_cluster_outputs];
  // Of the rule, the classes, and what the rows count, of this step and the one before it.
  float hyperparameters[2][Staged<float>::max_hyperparameters + 1];
  int labels[2][cluster_rows];
  float weights[2][rows_of_block];
  // For the parts of each of this block's rows, and for the gradients of each warp's 8 rows.
  unsigned long long parts_barrier[rows_of_block], grad_barrier[cluster_warps];
};

// What two mini-batches of the largest number of features leave for it, in the 227 KiB that a block has.
inline constexpr int cluster_memory_bytes = 27648;

inline constexpr int one_column = max_cluster_outputs;

struct OfWarp {
  // Of its 8 rows: the units' results, then the gradients of their preactivations.
  float units[8][cluster_stride];
  // These gradients, the three parts of each: of a part and a unit, the rows.
  bfloat16 parts[3][cluster_units][8];
  // A row of outputs, of their preactivations, and of their gradients.
  float y[max_cluster_outputs], z[max_cluster_outputs], grad[max_cluster_outputs];
};

template <int Ranks>
__device__ __forceinline__ OfWarp& of_warp(ClusterMemory<Ranks>& memory, int warp) {
  static_assert(sizeof(OfWarp) <= sizeof memory.of_warps[0]);
  return *reinterpret_cast<OfWarp*>(memory.of_warps[warp]);
}

// Two floats as sums of three bfloat16 numbers, those of each part in a word.
struct Parts {
  unsigned of[3];

  __device__ __forceinline__ Parts(float a, float b) {
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      of[part] = ptx::bfloats_of_floats(a, b);
      a -= reinterpreted<float>(of[part] << 16);
      b -= reinterpreted<float>(of[part] & 0xffff0000u);
    }
  }
};

// Parameters that a thread keeps, with their states.
template <class Rule, int n>
struct Kept {
  static constexpr int states = Rule::state_count, planes = 1 + states;
  float value[planes][n];

  __device__ __forceinline__ void load(int i, const float* from, Index plane) {
#pragma unroll
    for (int s = 0; s < planes; ++s) value[s][i] = from == nullptr ? 0.0f : from[s * plane];
  }
  __device__ __forceinline__ void store(int i, float* to, Index plane) const {
#pragma unroll
    for (int s = 0; s < planes; ++s) to[s * plane] = value[s][i];
  }
  __device__ __forceinline__ void update(int i, float gradient, const float* hyperparameters) {
    float state[states > 0 ? states : 1];
#pragma unroll
    for (int s = 0; s < states; ++s) state[s] = value[1 + s][i];
    apply_rule<Rule>(value[0][i], gradient, state, hyperparameters);
#pragma unroll
    for (int s = 0; s < states; ++s) value[1 + s][i] = state[s];
  }
};

// Of the parameters other than the first layer's weights: 8 threads share up to 4 neighbours, and the sum over the rows.
// Places are counted in numbers from the beginning of ClusterMemory.
struct SmallTask {
  // What is multiplied and added up of the thread's first row of the mini-batch, and how far it is to the eighth after it.
  int scale, grad, scale_rows, grad_rows;
  int to;         // the parameter's place; or -1
  float* global;  // the same in the network
};

// Grid: a cluster.
template <int Ranks, class Rule>
__global__ void __cluster_dims__(Ranks, 1, 1) __launch_bounds__(cluster_threads, 1)
    train_in_cluster(const __grid_constant__ ClusterTraining p, Index steps) {
  using Memory = ClusterMemory<Ranks>;
  static_assert(sizeof(Memory) <= cluster_memory_bytes);
  constexpr int rows_of_block = Memory::rows_of_block;
  auto* const dynamic = dynamic_shared<unsigned char>();
  Memory& memory = *reinterpret_cast<Memory*>(dynamic);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  // Of fragments (ptx.cuh).
  const int g = lane / 4, t = lane % 4;
  const int rank = static_cast<int>(ptx::cluster_rank());
  const int out = p.out, quads = (out + 3) / 4;
  const int all_steps = feature_steps(p.features);
  const Index first_step = p.progress->next;
  const double* const all_hyperparameters = p.progress->hyperparameters[0] + first_step * Rule::hyperparameter_count;
  const Index* const order = p.progress->order + first_step * p.progress->batch;
  const Index batch = p.progress->batch;

  // A lane keeps the weights of unit g, and of features 2t, 2t + 1, 2t + 8, 2t + 9 of each step of its warp's: both the
  // second operand of the forward matmul and the result of the one that gives their gradient.
  const int first_stride = row_stride(p.hidden), last_stride = row_stride(out);
  const auto first_weight = [&](int of_warp, int c) -> float* {
    const int feature = (of_warp * cluster_warps + warp) * 16 + c / 2 * 8 + 2 * t + c % 2,
              unit = rank * cluster_units + g;
    const bool there = feature < p.features && unit < p.hidden;
    return there ? p.first + static_cast<Index>(feature) * first_stride + unit : nullptr;
  };
  Kept<Rule, 4> weights[max_warp_steps];
#pragma unroll
  for (int q = 0; q < max_warp_steps; ++q)
#pragma unroll
    for (int c = 0; c < 4; ++c) weights[q].load(c, first_weight(q, c), p.plane);

  for (int n = thread; n < cluster_rows * cluster_stride; n += cluster_threads)
    memory.grad[n / cluster_stride][n % cluster_stride] = n % cluster_stride == one_column ? 1.0f : 0.0f;
  for (int n = thread; n < cluster_units * cluster_stride; n += cluster_threads)
    memory.weight[n / cluster_stride][n % cluster_stride] = 0;
  if (thread < cluster_units) memory.bias[thread] = 0;
  __syncthreads();

  // The other parameters: first the weights of the last layer, unit by unit, then its biases, then those of the units.
  constexpr int rounds = (cluster_units * max_cluster_outputs / 4 + max_cluster_outputs / 4 + cluster_units / 4 +
                          cluster_threads / 8 - 1) /
                         (cluster_threads / 8);
  const int weight_tasks = cluster_units * quads, tasks = weight_tasks + quads + cluster_units / 4;
  float* const numbers_of_memory = reinterpret_cast<float*>(dynamic);
  const auto place = [=](const float* number) { return static_cast<int>(number - numbers_of_memory); };
  const auto small_task = [&](int round) {
    const int task = min(round * (cluster_threads / 8) + thread / 8, tasks - 1), row = lane % 8, c = lane % 8 / 2;
    const bool there = round * (cluster_threads / 8) + thread / 8 < tasks && lane % 2 == 0;
    constexpr int of_grad = 8 * cluster_stride, of_units = sizeof memory.of_warps[0] / sizeof(float);
    const float* const units = of_warp(memory, 0).units[row];
    SmallTask result = {place(memory.grad[row] + one_column), place(memory.grad[row]), of_grad, of_grad, -1, nullptr};
    if (task < weight_tasks + quads) {
      const int unit = task / quads, j = task % quads * 4 + c;
      const int row_of_layer = task < weight_tasks ? rank * cluster_units + unit : p.hidden;
      result.grad += task % quads * 4;
      if (task < weight_tasks) result.scale = place(units + unit), result.scale_rows = of_units;
      if (there && j < out && (task >= weight_tasks || row_of_layer < p.hidden)) {
        result.to = place(task < weight_tasks ? &memory.weight[unit][j] : &memory.last_bias[j]);
        result.global = p.last + static_cast<Index>(row_of_layer) * last_stride + j;
      }
    } else {
      const int unit = (task - weight_tasks - quads) * 4;
      result.grad = place(units + cluster_units + unit);
      result.grad_rows = of_units;
      if (there && rank * cluster_units + unit + c < p.hidden) {
        result.to = place(&memory.bias[unit + c]);
        result.global = p.first + static_cast<Index>(p.features) * first_stride + rank * cluster_units + unit + c;
      }
    }
    return result;
  };
  Kept<Rule, rounds> small;
  SmallTask small_tasks[rounds];
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    const SmallTask& task = small_tasks[round] = small_task(round);
    small.load(round, task.global, p.plane);
    if (task.to >= 0) numbers_of_memory[task.to] = small.value[0][round];
  }

  const ptx::SharedAddress tiles = ptx::shared_address(dynamic + cluster_memory_bytes);
  constexpr int step_bytes = 2 * tile_numbers * static_cast<int>(sizeof(bfloat16));
  const int batch_bytes = all_steps * step_bytes;
  // A warp copies what it will read, and nobody else does.
  const auto* const own_tiles = reinterpret_cast<const unsigned char*>(p.tiles) + warp * step_bytes + lane * 16;
  const auto copy = [&](Index step) {
    if (step < steps) {
      const auto* const from = own_tiles + step * batch_bytes;
      const ptx::SharedAddress to = tiles + (static_cast<int>(step % 2) * batch_bytes + warp * step_bytes + lane * 16);
#pragma unroll
      for (int q = 0; q < max_warp_steps; ++q) {
        if (q * cluster_warps + warp >= all_steps) break;
#pragma unroll
        for (int part = 0; part < step_bytes / (32 * 16); ++part) {
          const int at = q * cluster_warps * step_bytes + part * 32 * 16;
          ptx::copy_async<16>(to + at, from + at, 16);
        }
      }
    }
    ptx::commit_copies();
  };
  copy(0);
  copy(1);

  if (thread < rows_of_block) ptx::init_barrier(ptx::shared_address(&memory.parts_barrier[thread]), 1);
  if (thread < cluster_warps) ptx::init_barrier(ptx::shared_address(&memory.grad_barrier[thread]), 1);
  ptx::fence_barrier_init();
  // All blocks have begun, and what others will write to is there.
  ptx::arrive_at_cluster();
  ptx::wait_for_cluster();

  // Of row warp * 8 + g and units 2t and 2t + 1 a bit that says whether the unit is kept; above them those of the next step.
  unsigned kept = 0;
  const auto draw = [&](Index step) {
    if (p.drops.keep == 0) return;
    const Index of_training = p.drops.draw.template step<true>() + step;
    kept |= p.drops.kept<2>(warp * 8 + g, rank * cluster_units + 2 * t, of_training) << 2;
  };
  draw(0);

  for (Index step = 0; step < steps; ++step) {
    const int parity = static_cast<int>(step % 2);
    const ptx::SharedAddress batch_tiles = tiles + (parity * batch_bytes + warp * step_bytes);
    OfWarp& own = of_warp(memory, warp);
    kept >>= 2;

    // Needed later.
    float hyperparameter = 0;
    int label = 0;
    float weight = 0;
    const int labelled = rank * rows_of_block + thread;
    if (thread < Rule::hyperparameter_count)
      hyperparameter = static_cast<float>(all_hyperparameters[step * Rule::hyperparameter_count + thread]);
    const bool has_row = thread < rows_of_block && labelled < p.rows;
    const bool stages_label = has_row && p.objective.labels != nullptr,
               stages_weight = has_row && p.objective.weights != nullptr;
    if (stages_label) label = p.objective.labels[step * p.rows + labelled];
    if (stages_weight) weight = p.objective.weights[step * p.rows + labelled];

    // Forward: each warp's part of the hidden units' sums, all rows.
    float sum[cluster_rows / 16][4] = {};
    ptx::wait_for_copies<1>();
    __syncwarp();
    {
      const ptx::SharedAddress from = batch_tiles + lane / 16 * 1024 + lane / 8 % 2 * 128 + lane % 8 * 16;
#pragma unroll
      for (int q = 0; q < max_warp_steps; ++q) {
        if (q * cluster_warps + warp >= all_steps) break;
        const float (&w)[4] = weights[q].value[0];
        const Parts low(w[0], w[1]), high(w[2], w[3]);
        unsigned x[cluster_rows / 16][4];
#pragma unroll
        for (int m = 0; m < cluster_rows / 16; ++m)
          ptx::load_matrices<false>(x[m], from + (q * cluster_warps * step_bytes + m * 256));
#pragma unroll
        for (int part = 0; part < 3; ++part)
#pragma unroll
          for (int m = 0; m < cluster_rows / 16; ++m) ptx::mma_bf16(sum[m], x[m], low.of[part], high.of[part]);
      }
    }
    // What lay here is of no use to any warp any more.
    __syncthreads();
    {
#pragma unroll
      for (int m = 0; m < cluster_rows / 16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          auto* const to = reinterpret_cast<float*>(memory.of_warps[2 * m + half]) + (warp * 32 + lane) * 2;
          store_pack(to, Pack<float, 2>{sum[m][2 * half], sum[m][2 * half + 1]});
        }
    }
    if (thread < Rule::hyperparameter_count) memory.hyperparameters[parity][thread] = hyperparameter;
    if (stages_weight) memory.weights[parity][thread] = weight;
    if (stages_label) memory.labels[parity][labelled] = label;
    __syncthreads();

    // The sums of a warp's 8 rows: lanes have row g, units 2t and 2t + 1.
    const int i = warp * 8 + g;
    float saved[2];
    {
      float total[2] = {};
      const auto* const from = reinterpret_cast<const float*>(memory.of_warps[warp]) + lane * 2;
#pragma unroll
      for (int w = 0; w < cluster_warps; ++w) {
        const Pack<float, 2> part = load_pack<2>(from + w * 64);
#pragma unroll
        for (int c = 0; c < 2; ++c) total[c] += part.value[c];
      }
      __syncwarp();
      Pack<float, 2> y;
      p.hidden_activation.with([&](auto formula) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float z = fma(total[c], p.scale, memory.bias[2 * t + c]);
          y.value[c] = formula.forward(z, p.hidden_activation.parameter);
          saved[c] = formula.needs_x ? z : y.value[c];
        }
      });
      if (p.drops.keep != 0) p.drops.apply(kept, y.value);
      // Rows that are not there have no part in any sum.
      if (i >= p.rows) y = {};
      store_pack(own.units[g] + 2 * t, y);
    }
    __syncwarp();

    // What the units add to the outputs of each row, to the block whose row it is.
    if (i < p.rows && t < quads) {
      float y[cluster_units], z[4] = {};
      load_numbers<cluster_units>(own.units[g], y);
#pragma unroll
      for (int u = 0; u < cluster_units; ++u) {
        float w[4];
        load_numbers<4>(memory.weight[u] + 4 * t, w);
#pragma unroll
        for (int c = 0; c < 4; ++c) z[c] = fma(y[u], w[c], z[c]);
      }
      const int slot = i % rows_of_block;
      ptx::store_to_block(ptx::shared_address(memory.parts[rank][slot] + 4 * t),
                          static_cast<unsigned>(i / rows_of_block), ptx::shared_address(&memory.parts_barrier[slot]),
                          z);
    }
    __syncwarp();

    // The loss of this block's rows; the gradients to all blocks. Nobody overwrites what a block has not read yet: who
    // sends parts has all gradients of the step before, and so all blocks have read their parts of it; and who sends
    // gradients has the parts of all blocks, which send them when they have used the gradients of the step before.
    Objective<float> objective = p.objective;
    if (objective.labels != nullptr) objective.labels = memory.labels[parity];
    objective.weights = nullptr;
    objective.samples = order + step * batch;
    objective.losses += step * p.rows;
    if (objective.correct != nullptr) objective.correct += step * p.rows;
#pragma unroll
    for (int first = 0; first < rows_of_block; first += cluster_warps) {
      const int slot = first + warp, row = rank * rows_of_block + slot;
      if (slot >= rows_of_block || row >= p.rows) break;
      const ptx::SharedAddress barrier = ptx::shared_address(&memory.parts_barrier[slot]);
      if (lane == 0) ptx::arrive_expecting(barrier, Ranks * quads * 16);
      ptx::wait_for_phase(barrier, parity);
      const int j = lane % 16, first_rank = lane / 16 * (Ranks / 2);
      float z = 0;
#pragma unroll
      for (int r = 0; r < Ranks / 2; ++r) z += memory.parts[first_rank + r][slot][j];
      z += __shfl_xor_sync(0xffffffffu, z, 16);
      if (lane < out) {
        float preactivation[1] = {z + memory.last_bias[j]}, y[1];
        p.activation.forward(preactivation, y);
        own.z[j] = preactivation[0];
        own.y[j] = y[0];
      } else if (lane < max_cluster_outputs) {
        own.grad[j] = 0;
      }
      __syncwarp();
      Target<float> target(objective, row, out);
      if (p.objective.weights != nullptr) target.weight = memory.weights[parity][slot];
      evaluate_row<16>(
          objective, target, p.activation, row, own.y, own.z, out,
          [&](int output, float gradient) { own.grad[output] = gradient; },
          [&] {
            __syncwarp();
            for (int n = lane; n < Ranks * quads; n += 32) {
              const int quad = n / Ranks;
              float some[4];
              load_numbers<4>(own.grad + 4 * quad, some);
              ptx::store_to_block(ptx::shared_address(memory.grad[row] + 4 * quad), static_cast<unsigned>(n % Ranks),
                                  ptx::shared_address(&memory.grad_barrier[row / 8]), some);
            }
          });
      __syncwarp();
    }
    // Here, as there is nothing to do but to wait.
    draw(step + 1);
    const int rows_of_warp = max(0, min(8, p.rows - warp * 8));
    if (rows_of_warp > 0) {
      const ptx::SharedAddress barrier = ptx::shared_address(&memory.grad_barrier[warp]);
      if (lane == 0) ptx::arrive_expecting(barrier, rows_of_warp * quads * 16);
      ptx::wait_for_phase(barrier, parity);
    }

    // Back to the units.
    {
      float grad[2] = {};
#pragma unroll
      for (int q = 0; q < max_cluster_outputs / 4; ++q) {
        if (q >= quads) break;
        float dz[4];
        load_numbers<4>(memory.grad[i] + 4 * q, dz);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float w[4];
          load_numbers<4>(memory.weight[2 * t + c] + 4 * q, w);
#pragma unroll
          for (int j = 0; j < 4; ++j) grad[c] = fma(dz[j], w[j], grad[c]);
        }
      }
      if (p.drops.keep != 0) p.drops.apply(kept, grad);
      p.hidden_activation.backward(grad, saved);
      if (i >= p.rows) grad[0] = grad[1] = 0;
      store_pack(own.units[g] + cluster_units + 2 * t, Pack<float, 2>{grad[0], grad[1]});
      const Parts parts(grad[0] * p.scale, grad[1] * p.scale);
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        own.parts[part][2 * t][g].bits = static_cast<unsigned short>(parts.of[part]);
        own.parts[part][2 * t + 1][g].bits = static_cast<unsigned short>(parts.of[part] >> 16);
      }
    }
    __syncthreads();

    float hyperparameters[Rule::hyperparameter_count];
#pragma unroll
    for (int s = 0; s < Rule::hyperparameter_count; ++s) hyperparameters[s] = memory.hyperparameters[parity][s];
    float of_biases[Rule::hyperparameter_count];
#pragma unroll
    for (int s = 0; s < Rule::hyperparameter_count; ++s) of_biases[s] = hyperparameters[s];
    if (!p.decays_biases) Rule::without_decay(of_biases);

#pragma unroll
    for (int round = 0; round < rounds; ++round) {
      if (round * (cluster_threads / 8) + warp * 4 >= tasks) break;
      const SmallTask& task = small_tasks[round];
      float grad[4] = {};
#pragma unroll
      for (int rows = 0; rows < cluster_rows / 8; ++rows) {
        float some[4];
        load_numbers<4>(numbers_of_memory + task.grad + rows * task.grad_rows, some);
        const float factor = numbers_of_memory[task.scale + rows * task.scale_rows];
#pragma unroll
        for (int c = 0; c < 4; ++c) grad[c] = fma(factor, some[c], grad[c]);
      }
      // Lanes 2 c and 2 c + 1 of the 8 get number c.
      exchange_sums<4, 2, 4>(grad, lane);
      grad[0] += __shfl_xor_sync(0xffffffffu, grad[0], 1);
      const bool is_bias = round * (cluster_threads / 8) + thread / 8 >= weight_tasks;
      float own[Rule::hyperparameter_count];
#pragma unroll
      for (int s = 0; s < Rule::hyperparameter_count; ++s) own[s] = is_bias ? of_biases[s] : hyperparameters[s];
      small.update(round, grad[0], own);
      if (task.to >= 0) numbers_of_memory[task.to] = small.value[0][round];
    }

    // The gradient of the first layer's weights: units times features. 16 rows of the first operand are two parts of 8
    // units; or the third part, twice, as what becomes of the second is not looked at.
    {
      unsigned two_parts[cluster_rows / 16][4], third_part[cluster_rows / 16][4];
#pragma unroll
      for (int k = 0; k < cluster_rows / 16; ++k) {
        // Matrices: the parts of 8 rows of the mini-batch, then of the 8 after them.
        const OfWarp& rows = of_warp(memory, 2 * k + lane / 16);
        ptx::load_matrices<false>(two_parts[k], ptx::shared_address(rows.parts[lane / 8 % 2][lane % 8]));
        ptx::load_matrices<false>(third_part[k], ptx::shared_address(rows.parts[2][lane % 8]));
      }
      const ptx::SharedAddress from = batch_tiles + lane * 16;
#pragma unroll
      for (int q = 0; q < max_warp_steps; ++q) {
        if (q * cluster_warps + warp >= all_steps) break;
        // Of 8 features and of the 8 after them; of the first two parts and of the third.
        float sums[2][2][4] = {};
#pragma unroll
        for (int rows = 0; rows < cluster_rows / 16; rows += 2)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            unsigned x[4];
            ptx::load_matrices<true>(x, from + (q * cluster_warps * step_bytes + half * 1024 + rows * 256));
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              ptx::mma_bf16(sums[half][0], two_parts[rows + r], x[2 * r], x[2 * r + 1]);
              ptx::mma_bf16(sums[half][1], third_part[rows + r], x[2 * r], x[2 * r + 1]);
            }
          }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float (&two)[4] = sums[c / 2][0];
          weights[q].update(c, two[c % 2] + (two[2 + c % 2] + sums[c / 2][1][c % 2]), hyperparameters);
        }
      }
    }
    // The warp needs this mini-batch no more.
    __syncwarp();
    copy(step + 2);
  }
  ptx::wait_for_copies<0>();

#pragma unroll
  for (int q = 0; q < max_warp_steps; ++q)
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (float* const to = first_weight(q, c)) weights[q].store(c, to, p.plane);
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    // Made anew, as addresses would take registers all along.
    const SmallTask task = small_task(round);
    const int biases = place(memory.last_bias);
    const bool of_all = task.to >= biases && task.to < biases + max_cluster_outputs;
    if (task.global != nullptr && (!of_all || rank == 0)) small.store(round, task.global, p.plane);
  }
}

//
// Losses
//

struct CloseSteps {
  const double* losses;  // of each row of each step
  const int* correct;    // or null
  int rows;
  double weight;  // of each loss
  Progress* progress;
};

// Adds the losses of each step, then of one after the other, as steps apart do. Grid: a block.
template <int threads>
__global__ void __launch_bounds__(threads) close_steps(const __grid_constant__ CloseSteps p, Index steps) {
  __shared__ double of_steps[threads];
  const int thread = static_cast<int>(threadIdx.x);
  double total = p.progress->loss[0], correct = 0;
  for (Index first = 0; first < steps; first += threads) {
    double loss = 0;
    if (first + thread < steps) {
      const Index at = (first + thread) * p.rows;
      // Many loads at a time.
#pragma unroll 16
      for (int i = 0; i < p.rows; ++i) loss += p.losses[at + i];
      if (p.correct != nullptr) {
#pragma unroll 16
        for (int i = 0; i < p.rows; ++i) correct += p.correct[at + i];
      }
    }
    of_steps[thread] = p.weight * loss;
    __syncthreads();
    const int count = static_cast<int>(min(static_cast<Index>(threads), steps - first));
    if (thread == 0)
      for (int s = 0; s < count; ++s) total += of_steps[s];
    __syncthreads();
  }
  correct = reduce_block(correct, Sum{}, of_steps);
  if (thread != 0) return;
  p.progress->loss[0] = total;
  p.progress->correct += static_cast<Index>(correct);
  p.progress->next += steps;
}

}  // namespace gemmlet
