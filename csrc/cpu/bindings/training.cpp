// The bindings of fused training. What comes from gemmlet.nn is checked as far as memory is concerned: dtypes, sizes,
// indices.
#include <algorithm>

#include <limits>

#include "cpu/bindings/bindings.h"
#include "cpu/training/plan.h"

namespace gemmlet::bindings {
namespace {

// (weight, bias, activation, its parameter, states of weight, states of bias, average of weight, average of bias)
using LayerTuple = std::tuple<py::array, py::array, int, double, std::vector<py::array>, std::vector<py::array>,
                              OptionalArray, OptionalArray>;
using LayerTuples = std::vector<LayerTuple>;

template <class T>
Parameter<T> parameter(py::array& value, std::vector<py::array>& states, OptionalArray& average, int rule) {
  Parameter<T> p{writable<T>(value, value.size(), "layers"), {}, nullptr};
  if (static_cast<int>(states.size()) != optimizer_state_count(rule)) refuse("layers", "wrong number of states");
  static_assert(max_states == 2);
  for (std::size_t s = 0; s < states.size(); ++s) p.state[s] = writable<T>(states[s], value.size(), "layers");
  if (average) p.average = writable<T>(*average, value.size(), "layers");
  return p;
}

template <class T>
std::vector<Layer<T>> checked_layers(LayerTuples& tuples, int rule, const char* name) {
  if (tuples.empty()) refuse(name, "no layers");
  checked_index(rule, optimizer_rule_names().size(), "rule");
  std::vector<Layer<T>> layers;
  for (auto& [weight, bias, activation, number, weight_states, bias_states, weight_average, bias_average] : tuples) {
    if (weight.ndim() != 2 || bias.ndim() != 1 || bias.shape(0) != weight.shape(1) || weight.size() == 0)
      refuse(name, "a weight of shape (in, out) and a bias of shape (out,) are needed");
    if (!layers.empty() && layers.back().out != weight.shape(0)) refuse(name, "widths do not fit");
    if (activation != -1) checked_index(activation, activation_names().size(), name);
    layers.push_back({weight.shape(0), weight.shape(1), parameter<T>(weight, weight_states, weight_average, rule),
                      parameter<T>(bias, bias_states, bias_average, rule), weight.shape(1), activation,
                      static_cast<T>(number)});
  }
  return layers;
}

const double* checked_scalars(const py::array& scalars, int rule, Index steps, const char* name) {
  return contiguous<double>(scalars, steps * optimizer_scalar_count(rule), name);
}

Steps checked_steps(const py::array& order, Index batch, Index samples) {
  const Index count = order.size();
  const Index* indices = contiguous<Index>(order, count, "order");
  if (batch < 1) refuse("batch", "must be at least 1");
  for (Index i = 0; i < count; ++i)
    if (indices[i] < 0 || indices[i] >= samples) refuse("order", "an index that is out of range");
  // More than there are would only overflow.
  return {indices, count, std::min(batch, std::max(count, Index{1}))};
}

Index step_count(const Steps& steps) { return (steps.count + steps.batch - 1) / steps.batch; }

template <class T>
Samples<T> dense_samples(const py::array& x, Index features, bool skip_zeros) {
  Samples<T> samples{features, nullptr, nullptr, nullptr, nullptr, T(1), T(0), skip_zeros};
  if (x.ndim() < 1 || x.size() != elements(x.shape(0), features, "x")) refuse("x", "wrong size");
  if (x.dtype().num() == py::dtype::num_of<std::uint8_t>())
    samples.bytes = contiguous<std::uint8_t>(x, x.size(), "x");
  else
    samples.values = contiguous<T>(x, x.size(), "x");
  return samples;
}

constexpr Index max_positions = std::numeric_limits<std::int32_t>::max();

template <class T>
Samples<T> sparse_samples(const py::array& x, const py::array& row_start, const py::array& columns, Index features,
                          const Steps& steps) {
  const Index rows = row_start.size() - 1;
  Samples<T> samples{features,
                     contiguous<T>(x, x.size(), "x"),
                     nullptr,
                     contiguous<Index>(row_start, rows + 1, "row_start"),
                     contiguous<std::int32_t>(columns, x.size(), "columns"),
                     T(1),
                     T(0),
                     true};
  // Of the rows that are read.
  Index nonzeros = 0;
  for (Index i = 0; i < steps.count; ++i) {
    const Index begin = samples.indptr[steps.order[i]], end = samples.indptr[steps.order[i] + 1];
    if (begin < 0 || begin > end || end > x.size()) refuse("row_start", "out of range");
    for (Index e = begin; e < end; ++e)
      if (samples.indices[e] < (e == begin ? 0 : samples.indices[e - 1] + 1) || samples.indices[e] >= features)
        refuse("columns", "out of range, or not ascending");
    nonzeros = (i % steps.batch == 0 ? 0 : nonzeros) + (end - begin);
    if (nonzeros > max_positions) refuse("batch", "a mini-batch has more than 2^31 numbers that are not 0");
  }
  return samples;
}

std::pair<double, Index> train_mlp(LayerTuples layers, const py::array& x, const OptionalArray& row_start,
                                   const OptionalArray& columns, bool skip_zeros, const py::array& targets, int loss,
                                   double loss_parameter, double row_weight, const py::array& order, Index batch,
                                   int rule, const py::array& scalars, double loss_sum) {
  if (layers.empty()) refuse("layers", "no layers");
  checked_index(is_row_loss(loss) ? ~loss : loss, (is_row_loss(loss) ? row_loss_names() : loss_names()).size(), "loss");
  if (row_start.has_value() != columns.has_value()) refuse("columns", "goes with row_start");
  return for_dtype(std::get<0>(layers[0]), "layers", [&](auto zero) {
    using T = decltype(zero);
    const std::vector<Layer<T>> checked = checked_layers<T>(layers, rule, "layers");
    const Index features = checked.front().in, out = checked.back().out;
    if (row_start && row_start->size() == 0) refuse("row_start", "empty");
    const Index count = row_start ? row_start->size() - 1 : (x.ndim() < 1 ? 0 : x.shape(0));
    const Steps steps = checked_steps(order, batch, count);
    Samples<T> samples = row_start ? sparse_samples<T>(x, *row_start, *columns, features, steps)
                                   : dense_samples<T>(x, features, skip_zeros);
    // Places in a mini-batch are counted in 32 bits.
    if (!row_start && elements(steps.batch, features, "batch") > max_positions) samples.skip_zeros = false;
    Targets<T> wanted{nullptr, nullptr};
    if (targets.dtype().num() == py::dtype::num_of<Index>()) {
      wanted.indices = contiguous<Index>(targets, count, "targets");
      for (Index i = 0; i < steps.count; ++i) {
        const Index index = wanted.indices[steps.order[i]];
        if (index < 0 || index >= (out == 1 && !is_row_loss(loss) ? 2 : out))
          refuse("targets", "a class index that is out of range");
      }
    } else {
      wanted.values = contiguous<T>(targets, elements(count, out, "targets"), "targets");
    }
    const Rule update{rule, checked_scalars(scalars, rule, step_count(steps), "scalars")};
    const MlpOutcome outcome = without_gil([&] {
      return gemmlet::train_mlp<T>(checked, samples, wanted, loss, static_cast<T>(loss_parameter), row_weight, steps,
                                   update, loss_sum);
    });
    return std::pair{outcome.loss, outcome.correct};
  });
}

std::pair<double, double> train_gan(LayerTuples generator, LayerTuples discriminator, const py::array& x, double scale,
                                    double shift, const py::array& noise, double real_target, bool non_saturating,
                                    const py::array& order, Index batch, int generator_rule,
                                    const py::array& generator_scalars, int discriminator_rule,
                                    const py::array& discriminator_scalars, const py::array& decay,
                                    std::pair<double, double> loss_sums) {
  if (generator.empty()) refuse("generator", "no layers");
  return for_dtype(std::get<0>(generator[0]), "generator", [&](auto zero) {
    using T = decltype(zero);
    const std::vector<Layer<T>> g = checked_layers<T>(generator, generator_rule, "generator"),
                                d = checked_layers<T>(discriminator, discriminator_rule, "discriminator");
    if (g.back().out != d.front().in) refuse("discriminator", "its first width is not the generator's last");
    if (d.back().out != 1) refuse("discriminator", "its last width is not 1");
    Samples<T> samples = dense_samples<T>(x, d.front().in, false);
    samples.scale = static_cast<T>(scale);
    samples.shift = static_cast<T>(shift);
    const Steps steps = checked_steps(order, batch, x.shape(0));
    const T* z = contiguous<T>(noise, elements(steps.count, g.front().in, "noise"), "noise");
    const Rule g_rule{generator_rule,
                      checked_scalars(generator_scalars, generator_rule, step_count(steps), "generator_scalars")};
    const Rule d_rule{discriminator_rule, checked_scalars(discriminator_scalars, discriminator_rule, step_count(steps),
                                                          "discriminator_scalars")};
    const double* averaging = contiguous<double>(decay, step_count(steps), "decay");
    const GanOutcome outcome = without_gil([&] {
      return gemmlet::train_gan<T>(g, d, samples, z, static_cast<T>(real_target), non_saturating, steps, g_rule, d_rule,
                                   averaging, {loss_sums.first, loss_sums.second});
    });
    return std::pair{outcome.generator_loss, outcome.discriminator_loss};
  });
}

}  // namespace

void bind_network(py::module_& m) {
  m.def("train_mlp", &train_mlp, py::arg("layers"), py::arg("x"), py::arg("row_start"), py::arg("columns"),
        py::arg("skip_zeros"), py::arg("targets"), py::arg("loss"), py::arg("loss_parameter"), py::arg("row_weight"),
        py::arg("order"), py::arg("batch"), py::arg("rule"), py::arg("scalars"), py::arg("loss_sum"));
  m.def("train_gan", &train_gan, py::arg("generator"), py::arg("discriminator"), py::arg("x"), py::arg("scale"),
        py::arg("shift"), py::arg("noise"), py::arg("real_target"), py::arg("non_saturating"), py::arg("order"),
        py::arg("batch"), py::arg("generator_rule"), py::arg("generator_scalars"), py::arg("discriminator_rule"),
        py::arg("discriminator_scalars"), py::arg("decay"), py::arg("loss_sums"));
}

}  // namespace gemmlet::bindings
