// The bindings of fused training, with the checks that protect memory: dtypes, sizes, indices. Python code that may run, as the
// phases are read, runs before the first size or pointer is taken: it may change any array.
#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/bindings/bindings.h"
#include "cpu/training/plan.h"

namespace gemmlet::bindings {
namespace {

// (weight, bias, activation, its parameter, states of weight, states of bias, average of weight, average of bias)
using LayerTuple = std::tuple<py::array, py::array, int, double, std::vector<py::array>, std::vector<py::array>,
                              OptionalArray, OptionalArray>;
using LayerTuples = std::vector<LayerTuple>;

template <class T>
Parameter<T> parameter(py::array& value, std::vector<py::array>& states, OptionalArray& average, int rule,
                       Overlaps& overlaps) {
  const auto own = [&](py::array& a) {
    overlaps.add(a, true);
    return writable<T>(a, value.size(), "networks");
  };
  Parameter<T> p{own(value), {}, average ? own(*average) : nullptr};
  if (static_cast<int>(states.size()) != (rule < 0 ? 0 : optimizer_state_count(rule)))
    refuse("networks", "wrong number of states");
  for (std::size_t s = 0; s < states.size(); ++s) p.state[s] = own(states[s]);
  return p;
}

template <class T>
std::vector<Layer<T>> checked_layers(LayerTuples& tuples, Index classes, int rule, Overlaps& overlaps) {
  const char* name = "networks";
  if (tuples.empty()) refuse(name, "no layers");
  std::vector<Layer<T>> layers;
  for (auto& [weight, bias, activation, number, weight_states, bias_states, weight_average, bias_average] : tuples) {
    if (weight.ndim() != 2 || bias.ndim() != 1 || bias.shape(0) != weight.shape(1) || weight.size() == 0)
      refuse(name, "a weight of shape (in, out) and a bias of shape (out,) are needed");
    if (!layers.empty() && layers.back().out != weight.shape(0)) refuse(name, "widths do not fit");
    if (activation != -1) checked_index(activation, activation_names().size(), name);
    layers.push_back({weight.shape(0), weight.shape(1),
                      parameter<T>(weight, weight_states, weight_average, rule, overlaps),
                      parameter<T>(bias, bias_states, bias_average, rule, overlaps), weight.shape(1), activation,
                      static_cast<T>(number)});
  }
  if (layers[0].in <= classes) refuse(name, "a first layer without inputs besides the classes");
  layers[0].in -= classes;
  layers[0].classes = classes;
  return layers;
}

// (network, layer, threshold, stream, seed)
using DropoutTuple = std::tuple<std::size_t, std::size_t, std::size_t, std::size_t, std::uint64_t>;

// Of a layer and of a forward pass: the sum is one of random.h.
constexpr std::size_t max_stream = 0x7fff;

template <class T>
void add_dropout(std::vector<std::vector<Layer<T>>>& networks, const DropoutTuple& given) {
  const auto [network, layer, keep, stream, seed] = given;
  if (network >= networks.size() || layer >= networks[network].size()) refuse("dropout", "no such layer");
  if (keep < 1 || keep > dropout::all || stream > max_stream) refuse("dropout", "out of range");
  networks[network][layer].dropout = {static_cast<unsigned>(keep), static_cast<unsigned>(stream), seed};
}

// (network, deviation, stream, seed)
using InputNoiseTuple = std::tuple<std::size_t, double, std::size_t, std::uint64_t>;

template <class T>
void add_input_noise(std::vector<std::vector<Layer<T>>>& networks, const InputNoiseTuple& given) {
  const auto [network, deviation, stream, seed] = given;
  if (network >= networks.size()) refuse("input_noise", "no such network");
  if (!(deviation >= 0) || stream > max_stream) refuse("input_noise", "out of range");
  networks[network].front().noise = {deviation, static_cast<unsigned>(stream), seed};
}

Steps checked_steps(const py::array& order, Index batch, Index samples) {
  const Index count = order.size();
  const Index* indices = contiguous<Index>(order, count, "order");
  if (batch < 1) refuse("batch", "must be at least 1");
  for (Index i = 0; i < count; ++i)
    if (indices[i] < 0 || indices[i] >= samples) refuse("order", "an index that is out of range");
  // A larger batch could overflow sizes.
  return {indices, count, std::min(batch, std::max(count, Index{1}))};
}

// The sums of the weights of each step's samples; none where their losses are divided by their number.
std::vector<double> checked_weight_sums(const double* weights, const Steps& steps, bool divides_by_rows) {
  std::vector<double> sums;
  for (Index i = 0; i < steps.count; ++i) {
    if (i % steps.batch == 0) sums.push_back(0);
    const double weight = weights[steps.order[i]];
    if (!(weight >= 0)) refuse("weights", "a number that is negative or NaN");
    sums.back() += weight;
  }
  for (const double sum : sums)
    if ((sum == 0 && !divides_by_rows) || !std::isfinite(sum))
      refuse("weights", "a mini-batch whose sum is 0 or infinite");
  return divides_by_rows ? std::vector<double>{} : sums;
}

template <class T>
Samples<T> dense_samples(const py::array& x, Index features, bool skip_zeros, const OptionalArray& value_of_byte) {
  Samples<T> samples{features, nullptr, nullptr, nullptr, nullptr, nullptr, T(1), T(0), skip_zeros};
  if (x.ndim() < 1 || x.size() != elements(x.shape(0), features, "x")) refuse("x", "wrong size");
  if (x.dtype().num() == py::dtype::num_of<std::uint8_t>())
    samples.bytes = contiguous<std::uint8_t>(x, x.size(), "x");
  else
    samples.values = contiguous<T>(x, x.size(), "x");
  if (value_of_byte) {
    samples.value_of_byte = contiguous<T>(*value_of_byte, 256, "value_of_byte");
    if (samples.bytes == nullptr) refuse("value_of_byte", "goes with bytes");
    samples.skip_zeros = skip_zeros && samples.value_of_byte[0] == T(0);
  }
  return samples;
}

constexpr Index max_inputs = 16;
constexpr Index max_positions = std::numeric_limits<std::int32_t>::max();

template <class T>
Samples<T> sparse_samples(const py::array& x, const py::array& indptr, const py::array& indices, Index features,
                          const Steps& steps) {
  const Index rows = indptr.size() - 1;
  Samples<T> samples{features,
                     contiguous<T>(x, x.size(), "x"),
                     nullptr,
                     nullptr,
                     contiguous<Index>(indptr, rows + 1, "indptr"),
                     contiguous<std::int32_t>(indices, x.size(), "indices"),
                     T(1),
                     T(0),
                     true};
  // The rows of `order` only.
  Index nonzeros = 0;
  for (Index i = 0; i < steps.count; ++i) {
    const Index begin = samples.indptr[steps.order[i]], end = samples.indptr[steps.order[i] + 1];
    if (begin < 0 || begin > end || end > x.size()) refuse("indptr", "out of range");
    const std::int32_t* row = samples.indices + begin;
    bool fits = begin == end || (row[0] >= 0 && row[end - begin - 1] < features);
    for (Index e = 1; e < end - begin; ++e) fits &= row[e - 1] < row[e];
    if (!fits) refuse("indices", "out of range, or not ascending");
    nonzeros = (i % steps.batch == 0 ? 0 : nonzeros) + (end - begin);
    if (nonzeros > max_positions) refuse("batch", "a mini-batch has more than 2^31 nonzeros");
  }
  return samples;
}

// The fields of a phase after its kind.
template <class... Fields>
std::tuple<Fields...> fields(const py::tuple& phase) {
  if (phase.size() != 1 + sizeof...(Fields)) refuse("phases", "a phase with a wrong number of fields");
  try {
    return [&]<std::size_t... i>(std::index_sequence<i...>) {
      return std::tuple<Fields...>{phase[1 + i].template cast<Fields>()...};
    }(std::index_sequence_for<Fields...>{});
  } catch (const py::cast_error&) {
    refuse("phases", "a field of the wrong type");
  }
}

// Whether the first field is this string.
bool is_kind(const py::tuple& phase, const char* kind) {
  return !phase.empty() && py::isinstance<py::str>(phase[0]) &&
         PyUnicode_CompareWithASCIIString(phase[0].ptr(), kind) == 0;
}

using GivenTargets = std::variant<py::array, std::vector<double>>;

// A phase as Python gives it; all but the first belong to a loss.
struct GivenPhase {
  Phase phase;
  int loss;
  double parameter, weight;
  GivenTargets targets;
  double least, most;
};

GivenPhase read_phase(const py::tuple& tuple) {
  const auto of = [](Phase phase) { return GivenPhase{std::move(phase), 0, 0, 0, {}, 0, 0}; };
  if (is_kind(tuple, "forward")) {
    // Most have no stream, and need not convert one.
    if (tuple.size() == 3) {
      auto [network, inputs] = fields<int, std::vector<int>>(tuple);
      return of({Phase::forward, network, std::move(inputs), -1, -1});
    }
    auto [network, inputs, stream] = fields<int, std::vector<int>, std::size_t>(tuple);
    if (stream > max_stream) refuse("phases", "a stream that is out of range");
    Phase phase{Phase::forward, network, std::move(inputs), -1, -1};
    phase.stream = static_cast<unsigned>(stream);
    return of(std::move(phase));
  }
  if (is_kind(tuple, "loss")) {
    auto [network, loss, parameter, weight, targets, least, most] =
        fields<int, int, double, double, GivenTargets, double, double>(tuple);
    return {{Phase::loss, network, {}, -1, -1}, loss, parameter, weight, std::move(targets), least, most};
  }
  if (is_kind(tuple, "backward")) {
    const auto [network, to] = fields<int, int>(tuple);
    return of({Phase::backward, network, {}, to, -1});
  }
  if (is_kind(tuple, "penalty")) {
    const auto [network, l2, l1, of_sum] = fields<int, double, double, bool>(tuple);
    Phase phase{Phase::penalty, network, {}, -1, -1};
    phase.l2 = l2;
    phase.l1 = l1;
    phase.of_sum = of_sum;
    return of(std::move(phase));
  }
  if (is_kind(tuple, "gradient_penalty")) {
    const auto [network, factor, share] = fields<int, double, Index>(tuple);
    if (!(factor >= 0) || share < 1 || share > max_positions) refuse("phases", "a gradient penalty of a wrong size");
    Phase phase{Phase::gradient_penalty, network, {}, -1, -1};
    phase.factor = factor;
    phase.share = share;
    return of(std::move(phase));
  }
  if (is_kind(tuple, "update")) {
    const auto [network, rule, limit, decays_biases] = fields<int, int, double, bool>(tuple);
    Phase phase{Phase::update, network, {}, -1, checked_index(rule, optimizer_rule_names().size(), "rule")};
    phase.limit = limit;
    phase.decays_biases = decays_biases;
    return of(std::move(phase));
  }
  refuse("phases", "an unknown kind of phase");
}

// Takes phases into the plan, and checks that each finds what it reads.
template <class T>
class Checker {
 public:
  Checker(Plan<T>& plan, const Batches<T>& batches, Overlaps& overlaps, Index noise_columns, Index samples)
      : plan_(plan),
        batches_(batches),
        overlaps_(overlaps),
        noise_columns_(noise_columns),
        samples_(samples),
        has_(plan.networks.size()) {}

  void operator()(const GivenPhase& given) {
    add(given.phase);
    if (given.phase.kind != Phase::loss) return;
    const int loss = given.loss;
    const bool of_rows = is_row_loss(loss);
    checked_index(of_rows ? ~loss : loss, (of_rows ? row_loss_names() : loss_names()).size(), "loss");
    plan_.losses.push_back({loss, given.parameter, given.weight, targets_of(given.targets, given.phase.network, loss),
                            given.least, given.most});
  }

 private:
  enum Gradient { none, of_outputs, of_parameters };
  struct State {
    std::vector<int> inputs;  // of the latest forward phase
    Gradient gradient = none;
    bool is_penalized = false;  // by a gradient penalty
  };

  static void need(bool there, const char* what) {
    if (!there) refuse("phases", what);
  }
  State& has(int network) { return has_[static_cast<std::size_t>(checked_index(network, has_.size(), "phases"))]; }
  const std::vector<Layer<T>>& layers(int network) const { return plan_.networks[static_cast<std::size_t>(network)]; }

  void add(Phase phase) {
    State& state = has(phase.network);
    if (phase.kind == Phase::forward) {
      need(!phase.inputs.empty() && phase.inputs.size() <= max_inputs, "a network without inputs, or with too many");
      for (const int source : phase.inputs) {
        Index width = source == samples_source ? plan_.samples.features : noise_columns_;
        if (source >= 0) {
          need(source != phase.network && has(source).inputs.size() == 1, "outputs that are not there");
          width = layers(source).back().out;
        }
        need(source >= noise_source, "an unknown input");
        need(width == layers(phase.network).front().in, "widths do not fit");
      }
      // Whoever has read the outputs that are replaced now can no longer go backward, nor be updated.
      for (State& other : has_)
        if (std::ranges::count(other.inputs, phase.network) > 0) other = {};
      state = {phase.inputs, none};
    } else {
      need(!state.inputs.empty(), "a network that has not gone forward");
    }
    if (phase.kind == Phase::loss) state.gradient = of_outputs;
    if (phase.kind == Phase::backward) {
      need(state.gradient == of_outputs, "no gradient to go backward from");
      if (phase.to >= 0) {
        need(state.inputs == std::vector<int>{phase.to}, "the gradient of something else than the input");
        has(phase.to).gradient = of_outputs;
      }
      state.gradient = phase.to >= 0 ? none : of_parameters;
      state.is_penalized = false;
    }
    if (phase.kind == Phase::gradient_penalty) {
      need(state.gradient == of_parameters && !state.is_penalized, "a gradient penalty without gradient, or two");
      need(state.inputs[0] == samples_source && layers(phase.network).back().out == 1,
           "a gradient penalty for samples that do not come first, or for several outputs");
      state.is_penalized = true;
    }
    if (phase.kind == Phase::penalty) need(state.gradient == of_parameters, "a penalty without gradient");
    if (phase.kind == Phase::update) {
      need(state.gradient == of_parameters, "an update without gradient");
      state.gradient = none;
    }
    plan_.phases.push_back(std::move(phase));
  }

  Targets<T> targets_of(const GivenTargets& given, int network, int loss) {
    const Index out = layers(network).back().out;
    Targets<T> targets{nullptr, nullptr, {}};
    if (const auto* constants = std::get_if<std::vector<double>>(&given)) {
      for (const double number : *constants) targets.constants.push_back(static_cast<T>(number));
      if (is_row_loss(loss) || constants->size() != has(network).inputs.size())
        refuse("targets", "not one number for each input of the network");
      return targets;
    }
    const auto& array = std::get<py::array>(given);
    overlaps_.add(array, false);
    if (array.dtype().num() != py::dtype::num_of<Index>()) {
      targets.values = contiguous<T>(array, elements(samples_, out, "targets"), "targets");
      return targets;
    }
    targets.indices = contiguous<Index>(array, samples_, "targets");
    for (Index i = 0; i < batches_.count; ++i) {
      const Index index = targets.indices[batches_.order[i]];
      if (index < 0 || index >= (out == 1 && !is_row_loss(loss) ? 2 : out))
        refuse("targets", "a class index that is out of range");
    }
    return targets;
  }

  Plan<T>& plan_;
  const Batches<T>& batches_;
  Overlaps& overlaps_;
  Index noise_columns_, samples_;
  std::vector<State> has_;
};

// The rule that updates a network; -1 is none.
int rule_of(const std::vector<GivenPhase>& phases, std::size_t network) {
  int found = -1;
  for (const auto& [phase, loss, parameter, weight, targets, least, most] : phases) {
    if (phase.kind != Phase::update || static_cast<std::size_t>(phase.network) != network) continue;
    if (found != -1 && found != phase.rule) refuse("phases", "two rules for one network");
    found = phase.rule;
  }
  return found;
}

// Memory of the calls of one training: a capsule, which Python code can neither make nor change.
constexpr const char* kept_memory_name = "gemmlet.KeptMemory";
py::capsule kept_memory() {
  return py::capsule(new KeptMemory, kept_memory_name, [](PyObject* capsule) {
    delete static_cast<KeptMemory*>(PyCapsule_GetPointer(capsule, kept_memory_name));
  });
}

// None where skipped zeros would hide weights that are not finite: 0 times them is NaN.
using TrainResult = std::optional<std::pair<std::vector<double>, Index>>;

TrainResult train(std::vector<LayerTuples> networks, const std::vector<py::tuple>& phases,
                  const std::vector<DropoutTuple>& dropouts, const std::vector<InputNoiseTuple>& input_noises,
                  const py::array& x, const OptionalArray& indptr, const OptionalArray& indices, bool skip_zeros,
                  const OptionalArray& value_of_byte, const OptionalArray& weights, bool divides_by_rows,
                  const OptionalArray& labels, Index classes, double scale, double shift, const py::array& order,
                  Index batch, const std::vector<py::array>& hyperparameters, const std::vector<double>& losses,
                  const OptionalArray& decay, const OptionalArray& noise, std::uint64_t first_step,
                  const py::capsule& capsule) {
  if (networks.empty() || networks[0].empty()) refuse("networks", "no layers");
  if (!PyCapsule_IsValid(capsule.ptr(), kept_memory_name)) refuse("kept", "not from kept_memory()");
  KeptMemory& kept = *capsule.get_pointer<KeptMemory>();
  if (indptr.has_value() != indices.has_value()) refuse("indices", "goes with indptr");
  std::vector<GivenPhase> given;
  for (const py::tuple& phase : phases) given.push_back(read_phase(phase));
  if (indptr && indptr->size() == 0) refuse("indptr", "empty");
  if (indptr && !input_noises.empty()) refuse("input_noise", "goes with dense samples");
  if (indptr && value_of_byte) refuse("value_of_byte", "goes with bytes");
  if (labels ? indptr || classes < 1 : classes != 0) refuse("labels", "go with dense samples and a number of classes");
  return for_dtype(std::get<0>(networks[0][0]), "networks", [&](auto zero) -> TrainResult {
    using T = decltype(zero);
    Plan<T> plan{};
    Overlaps overlaps;
    for (std::size_t n = 0; n < networks.size(); ++n)
      plan.networks.push_back(checked_layers<T>(networks[n], classes, rule_of(given, n), overlaps));
    for (const DropoutTuple& each : dropouts) {
      add_dropout(plan.networks, each);
      for (const GivenPhase& phase : given)
        if (phase.phase.kind == Phase::gradient_penalty && phase.phase.network == static_cast<int>(std::get<0>(each)))
          refuse("dropout", "the network has a gradient penalty");
    }
    for (const InputNoiseTuple& each : input_noises) add_input_noise(plan.networks, each);
    Batches<T> batches{};
    batches.first_step = first_step;
    const Index count = indptr ? indptr->size() - 1 : (x.ndim() < 1 ? 0 : x.shape(0));
    static_cast<Steps&>(batches) = checked_steps(order, batch, count);
    const Index steps = (batches.count + batches.batch - 1) / batches.batch;
    const Index features = indptr ? plan.networks[0].front().in : count > 0 ? x.size() / count : 0;
    plan.samples = indptr ? sparse_samples<T>(x, *indptr, *indices, features, batches)
                          : dense_samples<T>(x, features, skip_zeros, value_of_byte);
    if (weights) {
      plan.samples.weights = contiguous<double>(*weights, count, "weights");
      batches.weight_sums = checked_weight_sums(plan.samples.weights, batches, divides_by_rows);
    }
    if (labels) {
      plan.samples.labels = contiguous<Index>(*labels, count, "labels");
      for (Index i = 0; i < batches.count; ++i) {
        const Index label = plan.samples.labels[batches.order[i]];
        if (label < 0 || label >= classes) refuse("labels", "a class that is out of range");
      }
    }
    plan.samples.scale = static_cast<T>(scale);
    plan.samples.shift = static_cast<T>(shift);
    for (const auto& layers : plan.networks)
      for (const Layer<T>& layer : layers)  // so that no size of the executor's buffers overflows
        elements(batches.batch, max_inputs * 16 * (std::max(layer.in, layer.out) + 64), "batch");
    // Positions in a mini-batch are counted in 32 bits.
    if (!indptr && elements(batches.batch, features, "batch") > max_positions) plan.samples.skip_zeros = false;
    const Index noise_columns = noise && noise->ndim() == 2 ? noise->shape(1) : -1;
    if (noise) batches.noise = contiguous<T>(*noise, elements(batches.count, noise_columns, "noise"), "noise");

    Checker<T> check(plan, batches, overlaps, noise_columns, count);
    for (const GivenPhase& phase : given) check(phase);
    if (plan.phases.empty() || plan.phases.back().kind != Phase::update) refuse("phases", "no update at the end");
    const auto penalties = std::ranges::count(plan.phases, Phase::penalty, &Phase::kind);
    if (plan.losses.size() + static_cast<std::size_t>(penalties) != losses.size())
      refuse("losses", "not one for each loss and penalty");
    const bool is_scaled = scale != 1.0 || shift != 0.0;
    if (indptr && is_scaled) refuse("scale", "a sparse matrix is not scaled");
    if (is_scaled || !input_noises.empty()) plan.samples.skip_zeros = false;
    if (!is_pipelined(plan)) {
      if (indptr) refuse("indptr", "a sparse matrix is for a plan of one network alone");
      plan.samples.skip_zeros = false;
    }
    for (const Phase& phase : plan.phases) {
      if (phase.kind != Phase::update) continue;
      const std::size_t u = batches.hyperparameters.size();
      if (u == hyperparameters.size()) refuse("hyperparameters", "not one array for each update");
      const Index size = steps * optimizer_hyperparameter_count(phase.rule);
      batches.hyperparameters.push_back(contiguous<double>(hyperparameters[u], size, "hyperparameters"));
    }
    if (batches.hyperparameters.size() != hyperparameters.size())
      refuse("hyperparameters", "not one array for each update");
    if (decay) batches.decay = contiguous<double>(*decay, steps, "decay");
    for (const py::array& a : hyperparameters) overlaps.add(a, false);
    for (const py::array* a : {&x, &order}) overlaps.add(*a, false);
    for (const OptionalArray* a : {&indptr, &indices, &value_of_byte, &weights, &labels, &decay, &noise})
      if (*a) overlaps.add(**a, false);
    if (overlaps.found()) refuse("networks", "a parameter overlaps another array");
    const Layer<T>& first = plan.networks[0].front();
    if ((indptr || plan.samples.skip_zeros) && !is_finite(first.weight.value, first.in * first.out))
      return std::nullopt;
    Outcome outcome = without_gil([&] {
      KeptMemory own;
      const std::unique_lock lock(kept.used, std::try_to_lock);
      return gemmlet::train(plan, batches, losses, lock ? kept : own);
    });
    return std::pair{std::move(outcome.losses), outcome.correct};
  });
}

// (weight, bias, activation, its parameter)
using ForwardLayer = std::tuple<py::array, py::array, int, double>;

void forward(const std::vector<ForwardLayer>& tuples, const py::array& x, bool skip_zeros, py::array& out) {
  if (tuples.empty()) refuse("layers", "none");
  for_dtype(x, "x", [&](auto zero) {
    using T = decltype(zero);
    std::vector<Layer<T>> layers;
    Index in = x.ndim() == 2 ? x.shape(1) : -1;
    for (const auto& [weight, bias, activation, number] : tuples) {
      if (weight.ndim() != 2 || weight.shape(0) != in || weight.size() == 0) refuse("layers", "widths do not fit");
      in = weight.shape(1);
      if (activation != -1) checked_index(activation, activation_names().size(), "layers");
      // Which are not written.
      T* const w = const_cast<T*>(contiguous<T>(weight, weight.size(), "layers"));
      T* const b = const_cast<T*>(contiguous<T>(bias, in, "layers"));
      layers.push_back(
          {weight.shape(0), in, {w, {}, nullptr}, {b, {}, nullptr}, in, activation, static_cast<T>(number)});
    }
    const Index count = x.shape(0), row = tuning::row_block;
    for (const Layer<T>& layer : layers)  // so that no size of a buffer overflows
      elements(row, max_inputs * 16 * (std::max(layer.in, layer.out) + 64), "layers");
    const Samples<T> samples = dense_samples<T>(
        x, layers[0].in, skip_zeros && is_finite(layers[0].weight.value, layers[0].in * layers[0].out), std::nullopt);
    T* const to = writable<T>(out, elements(count, in, "out"), "out");
    if (count > 0) without_gil([&] { gemmlet::forward(layers, samples, count, to); });
  });
}

bool encode(const py::array& x, py::array& codes, py::array& value_of_byte) {
  return for_dtype(x, "x", [&](auto zero) {
    using T = decltype(zero);
    const T* from = contiguous<T>(x, x.size(), "x");
    std::uint8_t* to = writable<std::uint8_t>(codes, x.size(), "codes");
    T* values = writable<T>(value_of_byte, 256, "value_of_byte");
    return without_gil([&] { return gemmlet::encode(from, x.size(), to, values); });
  });
}

}  // namespace

void bind_training(py::module_& m) {
  def(m, "forward", &forward, "layers", "x", "skip_zeros", "out");
  def(m, "encode", &encode, "x", "codes", "value_of_byte");
  def(m, "kept_memory", &kept_memory);
  def(m, "train", &train, "networks", "phases", "dropout", "input_noise", "x", "indptr", "indices", "skip_zeros",
      "value_of_byte", "weights", "divides_by_rows", "labels", "classes", "scale", "shift", "order", "batch",
      "hyperparameters", "losses", "decay", "noise", "first_step", "kept");
}

}  // namespace gemmlet::bindings
