// Fused training: see plan.h.
//
// A step of a network is two phases. Rows: each thread takes some rows of the mini-batch through all layers, the loss,
// and back to the gradients of every layer's preactivation; no row needs another. Weights: each thread takes some rows
// of the weights, adds up their gradient in registers, and updates them there, so that no gradient of a weight is ever
// written. Between the phases all threads meet.
//
// Every sum is one chain: over the inputs first to last, over the rows of the mini-batch first to last; a step from
// outputs back to inputs sums as micro_kernel.h's dots do. None of it depends on how the work is divided. To skip a zero
// leaves out a product that is 0, which changes no bit.
//
// Rows of activations and gradients are padded to whole vectors with zeros.
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

// Multiply-adds below which a second thread costs more than it saves.
constexpr double parallel_work = 200e3;

// From so many mini-batches in a call, a thread that always has the same columns of the first layer copies them.
constexpr Index own_from_steps = 8;
// Up to so many threads, and rows of a mini-batch, each thread prepares all rows of bytes for itself.
constexpr Index most_own_threads = 4, most_own_rows = 1024;

// f(member) on all threads, if a step has work enough for them.
template <class F>
void with_team(double work, const F& f) {
  if (work > parallel_work && get_num_threads() > 1) return run_team(f);
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
  const Index most_rows = std::min(steps.batch, steps.count);
  const Network<T> network(layers, most_rows, 2);
  // Two mini-batches; or two for each thread, where to bring a row is less work than to fetch what another thread brought.
  const bool each = samples.skip_zeros && samples.bytes != nullptr && most_rows <= most_own_rows &&
                    get_num_threads() <= most_own_threads;
  const Index numbers = most_numbers(samples, steps), copies = each ? get_num_threads() : 1;
  std::vector<std::unique_ptr<Slot<T>>> slots;
  for (Index i = 0; i < 2 * copies; ++i) slots.push_back(std::make_unique<Slot<T>>(samples, most_rows, numbers));
  Objective<T> objective(targets, loss, loss_parameter, row_weight, layers.back().out, most_rows);
  MlpOutcome outcome{loss_sum, 0};

  const auto train = [&](Member& member) {
    const Index me = member.index(), all = member.count();
    const Range columns = network.first_columns(me, all);
    const OwnColumns<T> own(network.first_layer(), columns,
                            all > 1 && columns.size() > 0 && steps.count > own_from_steps * steps.batch);
    const Layer<T>& first_layer = own.layer();
    const auto rows_from = [&](Index start) { return std::clamp<Index>(steps.count - start, 0, steps.batch); };
    const bool own_slots = columns.size() > 0 && all <= copies;
    const Index number = own_slots ? 0 : me, share_of = own_slots ? 1 : all;
    const std::unique_ptr<Slot<T>>* const slot_at = &slots[static_cast<std::size_t>(own_slots ? 2 * me : 0)];
    // This member's rows of the mini-batch that begins at `start`.
    const auto bring = [&](Index start, Index slot) {
      const Range rows = part_of(rows_from(start), number, share_of);
      const Feed<T>& feed = slot_at[slot]->feed;
      for (Index i = rows.first; i < rows.end; ++i) {
        feed.bring(steps.order[start + i], i);
        if (start + steps.batch + i < steps.count) feed.prefetch(steps.order[start + steps.batch + i]);
      }
    };
    // What becomes of them once all members have brought theirs.
    const auto begin = [&](Index start, Index slot) {
      const Index rows = rows_from(start);
      Inputs<T>& inputs = slot_at[slot]->inputs;
      if (slot_at[slot]->feed.sparse() && rows > 0)
        for (Index block = number; block < pieces(samples.features, block_features); block += share_of)
          inputs.list(rows, samples.features, block);
      if (columns.size() > 0) network.forward_first(first_layer, inputs, slot, {0, rows}, columns);
    };

    bring(0, 0);
    member.barrier();
    begin(0, 0);
    member.barrier();
    const double* scalars = rule.scalars;
    Index slot = 0;
    for (Index start = 0; start < steps.count; start += steps.batch, slot ^= 1) {
      const Index batch_rows = rows_from(start);
      const Range mine = part_of(batch_rows, me, all);
      const T share = static_cast<T>(row_weight / static_cast<double>(batch_rows));
      for (Index first = mine.first; first < mine.end; first += most_task_rows) {
        const Range rows{first, std::min(mine.end, first + most_task_rows)};
        if (columns.size() == 0)
          network.forward_first(first_layer, slot_at[slot]->inputs, slot, rows, {0, layers[0].out});
        network.forward_rest(slot, rows);
        objective.evaluate(steps.order + start, rows, network, slot, share);
        network.backward(slot, rows, batch_rows, nullptr);
      }
      bring(start + steps.batch, slot ^ 1);
      member.barrier();

      network.update(rule.rule, first_layer, slot_at[slot]->inputs, slot, batch_rows, me, all, columns, scalars, 0.0);
      scalars += optimizer_scalar_count(rule.rule);
      if (me == 0)
        for (std::size_t i = 0; i < static_cast<std::size_t>(batch_rows); ++i) {
          outcome.loss += objective.losses[i] * row_weight;
          outcome.right += objective.right[i];
        }
      begin(start + steps.batch, slot ^ 1);
      member.barrier();
    }
  };
  with_team(static_cast<double>(most_rows) * network.work(), train);
  return outcome;
}

template <class T>
GanOutcome train_gan(const std::vector<Layer<T>>& generator, const std::vector<Layer<T>>& discriminator,
                     const Samples<T>& samples, const T* noise, T real_target, bool non_saturating, const Steps& steps,
                     const Rule& generator_rule, const Rule& discriminator_rule, const double* decay,
                     GanOutcome outcome) {
  if (steps.count == 0) return outcome;
  const Index most_rows = std::min(steps.batch, steps.count), latent = generator.front().in;
  const int loss = elementwise_loss_number("binary_cross_entropy_with_logits");
  const Network<T> g(generator, most_rows), d(discriminator, 2 * most_rows);
  // Rows of the discriminator: the samples, then what is generated.
  Inputs<T> g_inputs(most_rows), d_inputs(2 * most_rows), generated(most_rows);
  const Feed<T> feed(samples, most_rows, 0, d_inputs);
  for (Index i = 0; i < most_rows; ++i) generated.rows[static_cast<std::size_t>(i)] = g.outputs(0, i);
  std::vector<double> losses(static_cast<std::size_t>(2 * most_rows));

  const auto train = [&](Member& member) {
    const Index me = member.index(), all = member.count();
    const double *g_scalars = generator_rule.scalars, *d_scalars = discriminator_rule.scalars, *d_decay = decay;
    for (Index start = 0; start < steps.count; start += steps.batch) {
      const Index batch_rows = std::min(steps.batch, steps.count - start);
      const Range mine = part_of(batch_rows, me, all);
      const T share = static_cast<T>(1.0 / static_cast<double>(batch_rows));
      const auto evaluate = [&](Index i, T target, T weight) {
        losses[static_cast<std::size_t>(i)] =
            elementwise_loss_row(loss, d.outputs(0, i), &target, T(0), weight, d.output_gradients().row(i), Index{1});
      };
      const auto in_pieces = [&](auto&& f) {
        for (Index first = mine.first; first < mine.end; first += most_task_rows)
          f(Range{first, std::min(mine.end, first + most_task_rows)});
      };
      const auto forward = [](const Network<T>& network, const Inputs<T>& inputs, Range rows, Index out) {
        network.forward_first(network.first_layer(), inputs, 0, rows, {0, out});
        network.forward_rest(0, rows);
      };
      const Index g_out = generator.front().out, d_out = discriminator.front().out;

      in_pieces([&](Range rows) {
        for (Index i = rows.first; i < rows.end; ++i) {
          const auto at = static_cast<std::size_t>(i);
          feed.bring(steps.order[start + i], i);
          if (start + steps.batch + i < steps.count) feed.prefetch(steps.order[start + steps.batch + i]);
          g_inputs.rows[at] = noise + (start + i) * latent;
          d_inputs.rows[static_cast<std::size_t>(batch_rows) + at] = generated.rows[at];
        }
        forward(g, g_inputs, rows, g_out);
        for (const bool real : {true, false}) {
          const Range half = real ? rows : Range{rows.first + batch_rows, rows.end + batch_rows};
          forward(d, d_inputs, half, d_out);
          for (Index i = half.first; i < half.end; ++i) evaluate(i, real ? real_target : T(0), share);
          d.backward(0, half, 2 * batch_rows, nullptr);
        }
      });
      member.barrier();
      d.update(discriminator_rule.rule, d.first_layer(), d_inputs, 0, 2 * batch_rows, me, all, {0, 0}, d_scalars, 0.0);
      d_scalars += optimizer_scalar_count(discriminator_rule.rule);
      if (me == 0)
        for (Index i = 0; i < 2 * batch_rows; ++i) outcome.discriminator_loss += losses[static_cast<std::size_t>(i)];
      member.barrier();

      // The generator's loss goes through the discriminator as it is now. minimax: log(1 - D) shall become small, so
      // that loss and gradient of the target 0 change their sign.
      in_pieces([&](Range rows) {
        forward(d, generated, rows, d_out);
        for (Index i = rows.first; i < rows.end; ++i)
          non_saturating ? evaluate(i, T(1), share) : evaluate(i, T(0), -share);
        d.backward(0, rows, batch_rows, &g.output_gradients());
        g.backward(0, rows, batch_rows, nullptr);
      });
      member.barrier();
      g.update(generator_rule.rule, g.first_layer(), g_inputs, 0, batch_rows, me, all, {0, 0}, g_scalars, *d_decay++);
      g_scalars += optimizer_scalar_count(generator_rule.rule);
      if (me == 0)
        for (Index i = 0; i < batch_rows; ++i) {
          const double row_loss = losses[static_cast<std::size_t>(i)];
          outcome.generator_loss += non_saturating ? row_loss : -row_loss;
        }
      member.barrier();
    }
  };
  with_team(static_cast<double>(most_rows) * (g.work() + d.work()), train);
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
