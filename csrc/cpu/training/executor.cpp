// The executor of training plans: see plan.h.
//
// A step is a number of stages, each of two parts. Rows: each thread takes some rows of the mini-batch through the
// stage's phases, forward, loss and backward to the gradients of every layer's preactivation; no row needs another.
// Weights: each thread takes some rows of a network's weights, adds up their gradient in registers, and updates them
// there. Between the parts all threads meet. Where the weights do not fit the second-level cache, the first part is done
// layer by layer, each for all rows by all threads, and the gradient of some rows of weights waits in that cache for its
// update. No whole gradient of the weights is ever written.
//
// Every reduction is sequential: over input features in order, over the rows of the mini-batch in order; backward from
// outputs to inputs in the order of dense.h. None of it depends on how the work is divided.
// To skip a zero leaves out a product that is 0, which changes no bit.
#include <algorithm>
#include <atomic>
#include <deque>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/threads.h"
#include "cpu/training/loader.h"
#include "cpu/training/loss.h"

namespace gemmlet {
namespace {

// f(member) on all threads, if a step has work enough for them.
template <class F>
void with_team(double work, const F& f) {
  if (work > tuning::training_parallel_work && get_num_threads() > 1) return run_team(f);
  std::atomic<int> arrived{0};
  Member alone(0, 1, &arrived);
  f(alone);
}

// A forward phase with the rows that it reads: of input number i those from i * (rows of the mini-batch) on.
template <class T>
struct Forward {
  const Phase& phase;
  Network<T>& network;
  Inputs<T> inputs;
  std::optional<Loader<T>> loader;
  Rows<T> sample_gradients, zeros;  // of a gradient penalty: by the samples, in the rows after all inputs; and biases

  // With `copies` the rows of all inputs are copied, so that they follow each other in memory; with dropout and noise they
  // are, too. `is_penalized`: there is a gradient penalty.
  Forward(const Plan<T>& plan, const Phase& forward, Network<T>& of, KeptMemory& memory, Index max_rows, bool copies,
          bool is_penalized)
      : phase(forward), network(of), inputs(max_rows * (static_cast<Index>(forward.inputs.size()) + is_penalized)) {
    copies = copies || of.first_layer().changes_inputs();
    if (max_rows == 0) return;
    if (is_penalized) {
      sample_gradients = Rows<T>(memory, max_rows * (input_count() + 1), of.first_layer().in);
      zeros = Rows<T>(memory, 1, of.max_out());
      std::fill_n(zeros.row(0), zeros.stride, T(0));
    }
    if (of.first_layer().classes > 0) inputs.labels.resize(inputs.rows.size());
    // Samples in the places that they have among the inputs.
    const auto last = std::find(phase.inputs.rbegin(), phase.inputs.rend(), samples_source);
    const Index rows = max_rows * (copies ? input_count() : phase.inputs.rend() - last);
    if (last != phase.inputs.rend())
      loader.emplace(plan.samples, memory, rows, 0, copies, Dropout{}, InputNoise{}, inputs);
    else if (copies)
      inputs.copies = Rows<T>(memory, rows, of.first_layer().in);
  }
  Index input_count() const { return static_cast<Index>(phase.inputs.size()); }
};

// A phase, the forward phase whose rows it works on (itself, if it is one); the objective of a loss, or a penalty's sums: of
// the squared weights unless it is L1 alone, and with l1 of their sizes; and the place of either among the losses.
template <class T>
struct Work {
  const Phase& phase;
  Forward<T>* forward;
  Objective<T>* objective = nullptr;
  std::vector<double> squares = {}, sizes = {};
  std::size_t loss = 0;
};

// The factors of penalties, added up.
struct Factors {
  double l2 = 0, l1 = 0;
};

// Phases up to an update, that included.
template <class T>
struct Stage {
  std::vector<Work<T>> rows;
  Work<T> update;
  const double* hyperparameters;
  Factors of_sum, of_objective;  // of the weights that are updated
  Index share;                   // one of so many samples has a gradient penalty; 0 is none

  Adjustment adjustment(double weight_sum) const {
    const Phase& phase = update.phase;
    return {of_objective.l2 + of_sum.l2 / weight_sum, of_objective.l1 + of_sum.l1 / weight_sum, phase.limit,
            phase.decays_biases};
  }
};

template <class T>
class Executor {
 public:
  Executor(const Plan<T>& plan, const Batches<T>& batches, KeptMemory& memory)
      : plan_(plan),
        batches_(batches),
        memory_(memory),
        max_rows_(std::min(batches.batch, batches.count)),
        is_pipelined_(is_pipelined(plan)),
        by_layers_(max_rows_ >= tuning::tiles_min_rows && weight_bytes(plan) >= tuning::by_layers_min_bytes) {
    memory.begin();
    for (std::size_t n = 0; n < plan.networks.size(); ++n) {
      std::size_t inputs = 1;
      for (const Phase& phase : plan.phases)
        if (static_cast<std::size_t>(phase.network) == n) inputs = std::max(inputs, phase.inputs.size());
      inputs += is_penalized(static_cast<int>(n));
      networks_.emplace_back(plan.networks[n], memory, max_rows_ * static_cast<Index>(inputs), is_pipelined_ ? 2 : 1);
    }
    std::vector<Forward<T>*> latest(plan.networks.size());
    std::vector<Factors> of_sums(plan.networks.size()), of_objectives(plan.networks.size());
    std::vector<Index> shares(plan.networks.size());
    std::vector<Work<T>> rows;
    std::size_t losses = 0;
    for (const Phase& phase : plan.phases) {
      Forward<T>*& forward = latest[static_cast<std::size_t>(phase.network)];
      if (phase.kind == Phase::forward)
        forward = &forwards_.emplace_back(plan, phase, network(phase.network), memory, is_pipelined_ ? 0 : max_rows_,
                                          by_layers_, is_penalized(phase.network));
      Index& share = shares[static_cast<std::size_t>(phase.network)];
      Factors& of_sum = of_sums[static_cast<std::size_t>(phase.network)];
      Factors& of_objective = of_objectives[static_cast<std::size_t>(phase.network)];
      Work<T> work{phase, forward};
      if (phase.kind == Phase::loss)
        work.objective = &objectives_.emplace_back(plan.losses[objectives_.size()], forward->network, memory,
                                                   forward->input_count(), max_rows_);
      if (phase.kind == Phase::backward) of_sum = of_objective = {}, share = 0;  // of a gradient that is replaced
      if (phase.kind == Phase::gradient_penalty) share = phase.share;
      if (phase.kind == Phase::penalty) {
        Factors& factors = phase.of_sum ? of_sum : of_objective;
        factors.l2 += phase.l2;
        factors.l1 += phase.l1;
        const auto vectors = static_cast<std::size_t>(forward->network.vectors());
        if (phase.l2 != 0) work.squares.resize(vectors);
        if (phase.l1 != 0) work.sizes.resize(vectors);
      }
      if (phase.kind == Phase::loss || phase.kind == Phase::penalty) work.loss = losses++;
      if (phase.kind == Phase::update)
        stages_.push_back({std::exchange(rows, {}), work, batches.hyperparameters[stages_.size()],
                           std::exchange(of_sum, {}), std::exchange(of_objective, {}), std::exchange(share, 0)});
      else
        rows.push_back(std::move(work));
    }
  }

  Outcome run(std::vector<double> losses) {
    outcome_ = {std::move(losses), 0};
    double work = 0;
    for (const Network<T>& each : networks_) work += each.work();
    if (is_pipelined_) make_slots();
    if (by_layers_) make_workspaces();
    with_team(static_cast<double>(max_rows_) * work, [this](Member& member) { train(member); });
    if (out_of_memory_) throw std::bad_alloc();
    return std::move(outcome_);
  }

 private:
  // The first layer of the only network, one mini-batch ahead: rows are gathered while others go backward, and the
  // preactivations of some columns are computed by the thread that has just updated their weights.
  class Pipeline {
   public:
    Pipeline(Executor& executor, const Member& member)
        : executor_(executor),
          network_(executor.forwards_[0].network),
          columns_(network_.first_columns(member.index(), member.count())),
          own_(network_.first_layer(), columns_,
               member.count() > 1 && columns_.size() > 0 &&
                   executor.batches_.count > tuning::thread_columns_min_steps * executor.batches_.batch) {
      const bool own_slots = columns_.size() > 0 && 2 * member.count() <= static_cast<Index>(executor.slots_.size());
      number_ = own_slots ? 0 : member.index();
      members_ = own_slots ? 1 : member.count();
      const auto first_slot = static_cast<std::size_t>(own_slots ? 2 * member.index() : 0);
      for (const std::size_t slot : {0, 1}) slots_[slot] = &executor.slots_[first_slot + slot];
    }
    Range columns() const { return columns_; }
    const Layer<T>& layer() const { return own_.layer(); }
    Inputs<T>& inputs(Index slot) const { return slots_[slot]->inputs; }

    // This member's rows of the mini-batch that begins at `start`.
    void gather(Index start, Index slot) const {
      const Range rows = part_of(executor_.rows_from(start), number_, members_);
      const Loader<T>& loader = slots_[slot]->loader;
      for (Index i = rows.first; i < rows.end; ++i) executor_.load(loader, start + i, i);
      if (!loader.changes_rows()) return;
      const Draw draw = executor_.draw_of(executor_.forwards_[0], start);
      for (Index i = rows.first; i < rows.end; ++i) loader.change(i, draw.place(i), draw);
    }
    // What is done with them once all members have theirs.
    void begin(const Member& member, Index start, Index slot) const {
      const Index rows = executor_.rows_from(start), features = executor_.plan_.samples.features;
      if (slots_[slot]->loader.sparse() && rows > 0)
        for (Index block = number_; block < ceil_div(features, block_features); block += members_)
          inputs(slot).list(rows, features, block);
      if (columns_.size() > 0)
        network_.forward_first(layer(), inputs(slot), slot, {0, rows}, columns_, executor_.workspace(member, rows));
    }

   private:
    const Executor& executor_;
    const Network<T>& network_;
    Range columns_;
    ThreadColumns<T> own_;
    Index number_, members_;
    Slot<T>* slots_[2];
  };

  // Two mini-batches; or two for each thread, where to load a row is less work than to fetch what another thread loaded.
  void make_slots() {
    const Samples<T>& samples = plan_.samples;
    const bool each = samples.skip_zeros && samples.bytes != nullptr && max_rows_ <= tuning::private_loader_max_rows &&
                      get_num_threads() <= tuning::private_loader_max_threads;
    Index nonzeros;
    nonzeros_before_ = nonzeros_before(samples, batches_, nonzeros);
    const Index copies = each ? get_num_threads() : 1;
    const Layer<T>& first = forwards_[0].network.first_layer();
    for (Index i = 0; i < 2 * copies; ++i)
      slots_.emplace_back(samples, memory_, max_rows_, nonzeros, by_layers_, first.dropout, first.noise);
  }

  void make_workspaces() {
    Index max_k = 0;
    for (const Network<T>& each : networks_) max_k = std::max(max_k, each.max_k());
    for (int i = 0; i < get_num_threads(); ++i) workspaces_.emplace_back(memory_, max_k);
  }

  // Where a member packs, if the layers of a mini-batch of so many rows are computed one by one; else null.
  const Workspace<T>* workspace(const Member& member, Index rows) const {
    const bool by_layers = rows >= tuning::tiles_min_rows && member.count() <= static_cast<Index>(workspaces_.size());
    return by_layers ? &workspaces_[static_cast<std::size_t>(member.index())] : nullptr;
  }

  bool is_penalized(int network) const {
    return std::ranges::any_of(plan_.phases, [&](const Phase& phase) {
      return phase.kind == Phase::gradient_penalty && phase.network == network;
    });
  }

  static double weight_bytes(const Plan<T>& plan) {
    double bytes = 0;
    for (const std::vector<Layer<T>>& layers : plan.networks)
      for (const Layer<T>& layer : layers)
        bytes += static_cast<double>(layer.in) * static_cast<double>(layer.out) * sizeof(T);
    return bytes;
  }

  // Of the rows of the mini-batch that begins at `start`: their number, if they have no weights.
  double weight_sum_from(Index start) const {
    return batches_.weight_sums.empty() ? static_cast<double>(rows_from(start))
                                        : batches_.weight_sums[static_cast<std::size_t>(start / batches_.batch)];
  }

  // What the mini-batch that begins at `start` is drawn with.
  Draw draw_of(const Forward<T>& forward, Index start) const {
    return {batches_.first_step + static_cast<std::uint64_t>(start / batches_.batch), forward.phase.stream,
            rows_from(start)};
  }

  Index rows_from(Index start) const { return std::clamp<Index>(batches_.count - start, 0, batches_.batch); }

  // Sample order[at] becomes a row of the loader's inputs; the next mini-batch's is fetched into the cache.
  void load(const Loader<T>& loader, Index at, Index row) const {
    loader.load(batches_.order[at], row, nonzeros_before_.empty() ? 0 : nonzeros_before_[static_cast<std::size_t>(at)]);
    if (at + batches_.batch < batches_.count) loader.prefetch(batches_.order[at + batches_.batch]);
  }

  void train(Member& member) {
    const Index me = member.index(), all = member.count();
    std::optional<Pipeline> pipeline;
    try {
      of_this_thread<PackedPanel<T>>();
      if (is_pipelined_) pipeline.emplace(*this, member);
    } catch (const std::bad_alloc&) {
      out_of_memory_ = true;
    }
    member.barrier();
    if (out_of_memory_) return;
    if (is_pipelined_) {
      pipeline->gather(0, 0);
      member.barrier();
      pipeline->begin(member, 0, 0);
      member.barrier();
    }
    Index slot = 0, step = 0;
    for (Index start = 0; start < batches_.count; start += batches_.batch, ++step) {
      const Index batch_rows = rows_from(start), next = start + batches_.batch;
      const Range mine = part_of(batch_rows, me, all);
      for (Stage<T>& stage : stages_) {
        const Workspace<T>* const workspace = this->workspace(member, batch_rows);
        for (std::size_t i = 0; workspace != nullptr && i < stage.rows.size(); ++i)
          run_phase_together(member, stage.rows[i], start, batch_rows, mine, slot, pipeline, *workspace);
        for (Index first = mine.first; workspace == nullptr && first < mine.end; first += tuning::row_block) {
          const Range rows{first, std::min(mine.end, first + tuning::row_block)};
          for (const Work<T>& work : stage.rows) run_phase(work, start, batch_rows, rows, slot, pipeline);
        }
        const Range columns = pipeline ? pipeline->columns() : Range{0, 0};
        const auto first_layer = [&](const Network<T>& network) -> const Layer<T>& {
          return pipeline ? pipeline->layer() : network.first_layer();
        };
        for (Work<T>& work : stage.rows)
          if (!work.squares.empty() || !work.sizes.empty()) {
            const Network<T>& network = work.forward->network;
            const auto sums = [](std::vector<double>& of) { return of.empty() ? nullptr : of.data(); };
            network.sum_weights(first_layer(network), me, all, columns, sums(work.squares), sums(work.sizes));
          }
        if (pipeline) pipeline->gather(next, slot ^ 1);
        member.barrier();

        const Forward<T>& forward = *stage.update.forward;
        const Network<T>& network = forward.network;
        const int rule = stage.update.phase.rule;
        const Adjustment adjustment = stage.adjustment(weight_sum_from(start));
        network.update(rule, adjustment.needs_rule(), first_layer(network),
                       pipeline ? pipeline->inputs(slot) : forward.inputs, slot, batch_rows * forward.input_count(),
                       stage.share > 0 ? ceil_div(batch_rows, stage.share) : 0, me, all, columns, workspace,
                       stage.hyperparameters + step * optimizer_hyperparameter_count(rule), adjustment,
                       batches_.decay == nullptr ? 0.0 : batches_.decay[step]);
        if (me == 0) add_losses(stage, batch_rows, weight_sum_from(start));
        if (pipeline) pipeline->begin(member, next, slot ^ 1);
        member.barrier();
      }
      if (pipeline) slot ^= 1;
    }
  }

  // A phase for some rows of the mini-batch, of each input of its network.
  void run_phase(const Work<T>& work, Index start, Index batch_rows, Range mine, Index slot,
                 const std::optional<Pipeline>& pipeline) {
    Forward<T>& forward = *work.forward;
    const Network<T>& network = forward.network;
    if (work.phase.kind == Phase::gradient_penalty) return penalize(work, batch_rows, mine);
    for (Index input = 0; input < forward.input_count(); ++input) {
      const Index base = input * batch_rows;
      const Range rows{base + mine.first, base + mine.end};
      switch (work.phase.kind) {
        case Phase::forward:
          network.draw_dropout(rows, draw_of(forward, start));
          if (!pipeline) gather(forward, static_cast<std::size_t>(input), start, base, rows);
          if (!pipeline || pipeline->columns().size() == 0)
            network.forward_first(network.first_layer(), pipeline ? pipeline->inputs(slot) : forward.inputs, slot, rows,
                                  {0, network.first_layer().out}, nullptr);
          network.forward_rest(slot, rows);
          break;
        case Phase::loss: {
          const T scale = static_cast<T>(work.objective->loss.weight / static_cast<double>(batch_rows));
          work.objective->evaluate(batches_.order + start, base, static_cast<std::size_t>(input), rows, slot, scale);
          if (plan_.samples.weights != nullptr)
            work.objective->weigh(batches_.order + start, base, rows, plan_.samples.weights, weight_sum_from(start),
                                  batch_rows);
          break;
        }
        case Phase::backward: {
          const int to = work.phase.to;
          network.backward(slot, rows, batch_rows * forward.input_count(),
                           to < 0 ? nullptr : &this->network(to).output_gradients());
          break;
        }
        case Phase::penalty:
        case Phase::gradient_penalty:
        case Phase::update:
          break;
      }
    }
  }

  // The gradient penalty of those of the rows that have one, at most row_block.
  void penalize(const Work<T>& work, Index batch_rows, Range rows) {
    Forward<T>& forward = *work.forward;
    const Index count = ceil_div(batch_rows, work.phase.share), base = batch_rows * forward.input_count();
    rows.end = std::min(rows.end, count);
    if (rows.size() <= 0) return;
    for (Index i = base + rows.first; i < base + rows.end; ++i)
      forward.inputs.rows[static_cast<std::size_t>(i)] = forward.sample_gradients.row(i);
    forward.network.penalize(rows, base, base, static_cast<T>(work.phase.factor / static_cast<double>(count)),
                             forward.sample_gradients, forward.inputs.rows.data(), forward.zeros.row(0));
  }

  // A phase for the whole mini-batch, by all members; `mine` are the rows that this one gathers, and takes the loss of.
  void run_phase_together(Member& member, const Work<T>& work, Index start, Index batch_rows, Range mine, Index slot,
                          const std::optional<Pipeline>& pipeline, const Workspace<T>& workspace) {
    Forward<T>& forward = *work.forward;
    const Network<T>& network = forward.network;
    const Index rows = batch_rows * forward.input_count();
    switch (work.phase.kind) {
      case Phase::forward:
        for (Index input = 0; input < forward.input_count(); ++input) {
          const Index base = input * batch_rows;
          const Range some{base + mine.first, base + mine.end};
          network.draw_dropout(some, draw_of(forward, start));
          if (!pipeline) gather(forward, static_cast<std::size_t>(input), start, base, some);
        }
        if (!pipeline || network.has_dropout()) member.barrier();
        if (!pipeline || pipeline->columns().size() == 0)
          network.forward_first_together(member, pipeline ? pipeline->inputs(slot) : forward.inputs, slot, rows,
                                         workspace);
        network.forward_rest_together(member, slot, rows, workspace);
        break;
      case Phase::loss:
        run_phase(work, start, batch_rows, mine, slot, pipeline);
        member.barrier();
        break;
      case Phase::backward:
        network.backward_together(member, slot, rows,
                                  work.phase.to < 0 ? nullptr : &this->network(work.phase.to).output_gradients(),
                                  workspace);
        break;
      case Phase::gradient_penalty: {
        const Range part = part_of(ceil_div(batch_rows, work.phase.share), member.index(), member.count());
        for (Index first = part.first; first < part.end; first += tuning::row_block)
          penalize(work, batch_rows, {first, std::min(part.end, first + tuning::row_block)});
        break;
      }
      case Phase::penalty:
      case Phase::update:
        break;
    }
  }

  // Rows of an input, of which `base` is the first.
  void gather(Forward<T>& forward, std::size_t input, Index start, Index base, Range rows) {
    const int source = forward.phase.inputs[input];
    const Layer<T>& first = forward.network.first_layer();
    const Index features = first.in;
    const Draw draw = draw_of(forward, start);
    for (Index i = rows.first; i < rows.end; ++i) {
      const Index at = start + i - base;
      if (plan_.samples.labels != nullptr)
        forward.inputs.labels[static_cast<std::size_t>(i)] = plan_.samples.labels[batches_.order[at]];
      if (source == samples_source)
        load(*forward.loader, at, i);
      else
        forward.inputs.rows[static_cast<std::size_t>(i)] =
            source == noise_source ? batches_.noise + at * features : network(source).outputs(0, i - base);
      T* const copy = by_layers_ || first.changes_inputs() ? forward.inputs.copies.row(i) : nullptr;
      if (copy != nullptr && source != samples_source) {
        const T*& row = forward.inputs.rows[static_cast<std::size_t>(i)];
        row = std::copy_n(row, features, copy) - features;
      }
      if (first.noise) add_noise(first.noise, copy, features, draw.place(i), draw);
      if (first.dropout) forward.network.drop(0, i, copy, copy, {0, features});
    }
  }

  void add_losses(const Stage<T>& stage, Index batch_rows, double weight_sum) {
    for (const Work<T>& work : stage.rows) {
      double& loss = outcome_.losses[work.loss];
      const double rows_of_batch = static_cast<double>(batch_rows);
      const auto add = [&](double penalty) {
        if (penalty == 0) return;  // a sum of weights may underflow to 0
        loss += work.phase.of_sum ? penalty / (weight_sum / rows_of_batch) : penalty * rows_of_batch;
      };
      for (const double square : work.squares) add(0.5 * work.phase.l2 * square);
      for (const double size : work.sizes) add(work.phase.l1 * size);
      if (work.objective == nullptr) continue;
      const Objective<T>& objective = *work.objective;
      const auto rows = static_cast<std::size_t>(batch_rows * objective.inputs);
      for (std::size_t i = 0; i < rows; ++i) {
        loss += objective.losses[i] * objective.loss.weight;
        if (&objective == &objectives_[0]) outcome_.correct += objective.correct[i];
      }
    }
  }

  Network<T>& network(int number) { return networks_[static_cast<std::size_t>(number)]; }

  const Plan<T>& plan_;
  const Batches<T>& batches_;
  KeptMemory& memory_;
  Index max_rows_;
  bool is_pipelined_, by_layers_;
  std::atomic<bool> out_of_memory_{false};  // of a member
  std::vector<Workspace<T>> workspaces_;    // one for each thread, where layers are computed one by one
  // Deques, as others point to their elements.
  std::deque<Network<T>> networks_;
  std::deque<Forward<T>> forwards_;
  std::deque<Objective<T>> objectives_;
  std::deque<Slot<T>> slots_;
  std::vector<std::int32_t> nonzeros_before_;  // of each row in its mini-batch
  std::vector<Stage<T>> stages_;
  Outcome outcome_;
};

}  // namespace

template <class T>
Outcome train(const Plan<T>& plan, const Batches<T>& batches, std::vector<double> losses, KeptMemory& memory) {
  if (batches.count == 0) return {std::move(losses), 0};
  return Executor<T>(plan, batches, memory).run(std::move(losses));
}

// Each member takes some rows at a time through all layers: their activations stay in its cache, and nobody waits.
template <class T>
void forward(const std::vector<Layer<T>>& layers, const Samples<T>& samples, Index count, T* outputs) {
  KeptMemory memory;
  const Index rows = std::min(count, tuning::row_block), out = layers.back().out;
  std::deque<Network<T>> networks;
  std::deque<Slot<T>> slots;
  for (int i = 0; i < get_num_threads(); ++i) {
    networks.emplace_back(layers, memory, rows);
    slots.emplace_back(samples, memory, rows, rows * samples.features, false);
  }
  std::atomic<bool> out_of_memory{false};
  with_team(static_cast<double>(count) * networks[0].work(), [&](Member& member) {
    const Index members = std::min(member.count(), static_cast<int>(networks.size()));
    if (member.index() >= members) return;
    try {
      of_this_thread<PackedPanel<T>>();
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
      return;
    }
    const Network<T>& network = networks[static_cast<std::size_t>(member.index())];
    const Slot<T>& slot = slots[static_cast<std::size_t>(member.index())];
    const Range mine = part_of(count, member.index(), members);
    for (Index first = mine.first; first < mine.end; first += rows) {
      const Index some = std::min(rows, mine.end - first);
      for (Index i = 0; i < some; ++i) slot.loader.load(first + i, i, 0);
      network.forward_first(layers[0], slot.inputs, 0, {0, some}, {0, layers[0].out}, nullptr);
      network.forward_rest(0, {0, some});
      for (Index i = 0; i < some; ++i) std::copy_n(network.outputs(0, i), out, outputs + (first + i) * out);
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

template void forward(const std::vector<Layer<float>>&, const Samples<float>&, Index, float*);
template void forward(const std::vector<Layer<double>>&, const Samples<double>&, Index, double*);
template Outcome train(const Plan<float>&, const Batches<float>&, std::vector<double>, KeptMemory&);
template Outcome train(const Plan<double>&, const Batches<double>&, std::vector<double>, KeptMemory&);

}  // namespace gemmlet
