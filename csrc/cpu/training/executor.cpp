// Fused training: the loops over mini-batches of an MLP and of a GAN, on all threads of a team. Contract in plan.h.
//
// A step of a network has two phases, with a barrier after each. Rows: each thread takes some rows of the mini-batch
// through all layers, the loss, and back to the gradients of every layer's preactivations; rows are independent. Weights:
// each thread reduces the gradient of some weights in registers and updates them there.
//
// Every reduction is sequential: over input features in order, then over the rows of the mini-batch; backward through a
// layer reduces as dense.h says. None depends on the number of threads. Skipping a zero leaves out a term that is 0, which
// changes no bit.
#include "cpu/training/plan.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/threads.h"
#include "cpu/training/buffers.h"
#include "cpu/training/loader.h"
#include "cpu/training/loss.h"
#include "cpu/training/network.h"

namespace gemmlet {
namespace {

// f(member) on all threads, if the work of a step is worth them.
template <class F>
void with_team(double work, const F& f) {
  if (work > tuning::training_parallel_work && get_num_threads() > 1) return run_team(f);
  std::atomic<int> arrived{0};
  Member alone(0, 1, &arrived);
  f(alone);
}

}  // namespace

template <class T>
MlpOutcome train_mlp(const std::vector<Layer<T>>& layers, const Samples<T>& samples, const Targets<T>& targets,
                     int loss, T loss_parameter, double row_weight, const Steps& steps, const Rule& rule,
                     double loss_sum) {
  if (steps.count == 0) return {loss_sum, 0};
  const Index max_rows = std::min(steps.batch, steps.count);
  const Network<T> network(layers, max_rows, 2);
  // Double-buffered mini-batches: shared by all threads, or two for each thread.
  const bool private_loaders = samples.skip_zeros && samples.bytes != nullptr &&
                               max_rows <= tuning::private_loader_max_rows &&
                               get_num_threads() <= tuning::private_loader_max_threads;
  const Index nonzeros = max_nonzeros(samples, steps), loaders = private_loaders ? get_num_threads() : 1;
  std::vector<std::unique_ptr<Slot<T>>> slots;
  for (Index i = 0; i < 2 * loaders; ++i) slots.push_back(std::make_unique<Slot<T>>(samples, max_rows, nonzeros));
  Objective<T> objective(targets, loss, loss_parameter, row_weight, layers.back().out, max_rows);
  MlpOutcome outcome{loss_sum, 0};

  const auto train = [&](Member& member) {
    const Index me = member.index(), all = member.count();
    const Range columns = network.first_columns(me, all);
    const ThreadColumns<T> own(
        network.first_layer(), columns,
        all > 1 && columns.size() > 0 && steps.count > tuning::thread_columns_min_steps * steps.batch);
    const Layer<T>& first_layer = own.layer();
    const auto rows_from = [&](Index start) { return std::clamp<Index>(steps.count - start, 0, steps.batch); };
    const bool own_slots = columns.size() > 0 && all <= loaders;
    const Index part = own_slots ? 0 : me, parts = own_slots ? 1 : all;
    const std::unique_ptr<Slot<T>>* const slot_at = &slots[static_cast<std::size_t>(own_slots ? 2 * me : 0)];
    // Loads this member's rows of the mini-batch that begins at `start`.
    const auto load_rows = [&](Index start, Index slot) {
      const Range rows = part_of(rows_from(start), part, parts);
      const Loader<T>& loader = slot_at[slot]->loader;
      for (Index i = rows.first; i < rows.end; ++i) {
        loader.load(steps.order[start + i], i);
        if (start + steps.batch + i < steps.count) loader.prefetch(steps.order[start + steps.batch + i]);
      }
    };
    // The first layer of that mini-batch, once all members have loaded their rows.
    const auto forward_loaded = [&](Index start, Index slot) {
      const Index rows = rows_from(start);
      Inputs<T>& inputs = slot_at[slot]->inputs;
      if (slot_at[slot]->loader.sparse() && rows > 0)
        for (Index block = part; block < ceil_div(samples.features, block_features); block += parts)
          inputs.list(rows, samples.features, block);
      if (columns.size() > 0) network.forward_first(first_layer, inputs, slot, {0, rows}, columns);
    };

    load_rows(0, 0);
    member.barrier();
    forward_loaded(0, 0);
    member.barrier();
    const double* hyperparameters = rule.hyperparameters;
    Index slot = 0;
    for (Index start = 0; start < steps.count; start += steps.batch, slot ^= 1) {
      const Index batch_rows = rows_from(start);
      const Range mine = part_of(batch_rows, me, all);
      const T scale = static_cast<T>(row_weight / static_cast<double>(batch_rows));
      for (Index first = mine.first; first < mine.end; first += tuning::row_block) {
        const Range rows{first, std::min(mine.end, first + tuning::row_block)};
        if (columns.size() == 0)
          network.forward_first(first_layer, slot_at[slot]->inputs, slot, rows, {0, layers[0].out});
        network.forward_rest(slot, rows);
        objective.evaluate(steps.order + start, rows, network, slot, scale);
        network.backward(slot, rows, batch_rows, nullptr);
      }
      load_rows(start + steps.batch, slot ^ 1);
      member.barrier();

      network.update(rule.rule, first_layer, slot_at[slot]->inputs, slot, batch_rows, me, all, columns, hyperparameters,
                     0.0);
      hyperparameters += optimizer_scalar_count(rule.rule);
      if (me == 0)
        for (std::size_t i = 0; i < static_cast<std::size_t>(batch_rows); ++i) {
          outcome.loss += objective.losses[i] * row_weight;
          outcome.correct += objective.correct[i];
        }
      forward_loaded(start + steps.batch, slot ^ 1);
      member.barrier();
    }
  };
  with_team(static_cast<double>(max_rows) * network.work(), train);
  return outcome;
}

template <class T>
GanOutcome train_gan(const std::vector<Layer<T>>& generator, const std::vector<Layer<T>>& discriminator,
                     const Samples<T>& samples, const T* noise, T real_target, bool non_saturating, const Steps& steps,
                     const Rule& generator_rule, const Rule& discriminator_rule, const double* decay,
                     GanOutcome outcome) {
  if (steps.count == 0) return outcome;
  const Index max_rows = std::min(steps.batch, steps.count), latent = generator.front().in;
  const int loss = elementwise_loss_number("binary_cross_entropy_with_logits");
  const Network<T> g(generator, max_rows), d(discriminator, 2 * max_rows);
  // The discriminator's mini-batch: the samples, then the generated rows.
  Inputs<T> g_inputs(max_rows), d_inputs(2 * max_rows), generated(max_rows);
  const Loader<T> loader(samples, max_rows, 0, d_inputs);
  for (Index i = 0; i < max_rows; ++i) generated.rows[static_cast<std::size_t>(i)] = g.outputs(0, i);
  std::vector<double> losses(static_cast<std::size_t>(2 * max_rows));

  const auto train = [&](Member& member) {
    const Index me = member.index(), all = member.count();
    const double *g_hyperparameters = generator_rule.hyperparameters,
                 *d_hyperparameters = discriminator_rule.hyperparameters, *d_decay = decay;
    for (Index start = 0; start < steps.count; start += steps.batch) {
      const Index batch_rows = std::min(steps.batch, steps.count - start);
      const Range mine = part_of(batch_rows, me, all);
      const T scale = static_cast<T>(1.0 / static_cast<double>(batch_rows));
      const auto evaluate = [&](Index i, T target, T weight) {
        losses[static_cast<std::size_t>(i)] =
            elementwise_loss_row(loss, d.outputs(0, i), &target, T(0), weight, d.output_gradients().row(i), Index{1});
      };
      const auto for_row_blocks = [&](auto&& f) {
        for (Index first = mine.first; first < mine.end; first += tuning::row_block)
          f(Range{first, std::min(mine.end, first + tuning::row_block)});
      };
      const auto forward = [](const Network<T>& network, const Inputs<T>& inputs, Range rows, Index out) {
        network.forward_first(network.first_layer(), inputs, 0, rows, {0, out});
        network.forward_rest(0, rows);
      };
      const Index g_out = generator.front().out, d_out = discriminator.front().out;

      for_row_blocks([&](Range rows) {
        for (Index i = rows.first; i < rows.end; ++i) {
          const auto at = static_cast<std::size_t>(i);
          loader.load(steps.order[start + i], i);
          if (start + steps.batch + i < steps.count) loader.prefetch(steps.order[start + steps.batch + i]);
          g_inputs.rows[at] = noise + (start + i) * latent;
          d_inputs.rows[static_cast<std::size_t>(batch_rows) + at] = generated.rows[at];
        }
        forward(g, g_inputs, rows, g_out);
        for (const bool real : {true, false}) {
          const Range half = real ? rows : Range{rows.first + batch_rows, rows.end + batch_rows};
          forward(d, d_inputs, half, d_out);
          for (Index i = half.first; i < half.end; ++i) evaluate(i, real ? real_target : T(0), scale);
          d.backward(0, half, 2 * batch_rows, nullptr);
        }
      });
      member.barrier();
      d.update(discriminator_rule.rule, d.first_layer(), d_inputs, 0, 2 * batch_rows, me, all, {0, 0},
               d_hyperparameters, 0.0);
      d_hyperparameters += optimizer_scalar_count(discriminator_rule.rule);
      if (me == 0)
        for (Index i = 0; i < 2 * batch_rows; ++i) outcome.discriminator_loss += losses[static_cast<std::size_t>(i)];
      member.barrier();

      // The generator's loss passes through the updated discriminator. Minimax minimizes log(1 - D): the loss of target 0,
      // with the sign of loss and gradient changed.
      for_row_blocks([&](Range rows) {
        forward(d, generated, rows, d_out);
        for (Index i = rows.first; i < rows.end; ++i)
          non_saturating ? evaluate(i, T(1), scale) : evaluate(i, T(0), -scale);
        d.backward(0, rows, batch_rows, &g.output_gradients());
        g.backward(0, rows, batch_rows, nullptr);
      });
      member.barrier();
      g.update(generator_rule.rule, g.first_layer(), g_inputs, 0, batch_rows, me, all, {0, 0}, g_hyperparameters,
               *d_decay++);
      g_hyperparameters += optimizer_scalar_count(generator_rule.rule);
      if (me == 0)
        for (Index i = 0; i < batch_rows; ++i) {
          const double row_loss = losses[static_cast<std::size_t>(i)];
          outcome.generator_loss += non_saturating ? row_loss : -row_loss;
        }
      member.barrier();
    }
  };
  with_team(static_cast<double>(max_rows) * (g.work() + d.work()), train);
  return outcome;
}

#define GEMMLET_INSTANTIATE(T)                                                                                      \
  template MlpOutcome train_mlp(const std::vector<Layer<T>>&, const Samples<T>&, const Targets<T>&, int, T, double, \
                                const Steps&, const Rule&, double);                                                 \
  template GanOutcome train_gan(const std::vector<Layer<T>>&, const std::vector<Layer<T>>&, const Samples<T>&,      \
                                const T*, T, bool, const Steps&, const Rule&, const Rule&, const double*, GanOutcome);
GEMMLET_INSTANTIATE(float)
GEMMLET_INSTANTIATE(double)

}  // namespace gemmlet
