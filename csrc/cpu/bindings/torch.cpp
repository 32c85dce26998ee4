// Kernels and fused training on PyTorch's tensors: no header of PyTorch, no copies, no maths.
//
// Contract
//   Tensors are seen, and made, by the functions of DLPack's exchange API (1.3), which use_torch() is given once. What a
//   DLTensor points to is valid as long as no Python code runs: from the first look at a tensor to the kernel none does, not
//   even a collection's (Preparation). Where the GIL is released the storages are held from before that on: another thread
//   may give a tensor other memory.
//   Usual are torch.Tensor and torch.nn.Parameter themselves, on the CPU, float32 or float64 in one call, not empty.
//   Where anything is unusual a function returns None, having written nothing: PyTorch computes it then, or raises.
//   Weights are (out, in), as PyTorch has them: of any strides for the kernels, whole columns for fused training, which is
//   the layout that it needs. Whoever calls takes care of autograd: of version counters, and of who needs which gradient.
#include <algorithm>
#include <cmath>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/bindings/bindings.h"
#include "cpu/training/plan.h"
#include "cpu/tuning.h"

namespace gemmlet::bindings {
namespace {

// DLPack.

struct DlVersion {
  std::uint32_t major, minor;
};
struct DlType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct DlTensor {
  void* data;
  std::int32_t device_type, device;
  std::int32_t dimensions;
  DlType type;
  std::int64_t *shape, *strides;  // in elements
  std::uint64_t byte_offset;
};
struct DlManaged;
struct DlExchange {
  DlVersion version;
  const DlExchange* previous;
  int (*allocate)(DlTensor* prototype, DlManaged** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, DlManaged** out);
  int (*object_from_managed)(DlManaged* tensor, void** out);
  int (*view)(void* object, DlTensor* out);
  int (*stream)(int device_type, std::int32_t device, void** out);
};
constexpr std::int32_t cpu_device = 1;
constexpr std::uint8_t dl_int = 0, dl_float = 2;

// Of the process: types and capsule live as long as PyTorch, which cannot be unloaded.
const DlExchange* exchange = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
PyObject* untyped_storage = nullptr;  // a name
PyObject *has_modes = nullptr, *without_modes = nullptr;

struct Unusual : std::exception {};

// call(), or None if anything is unusual.
template <class Call>
auto unless_unusual(Call&& call) -> std::optional<decltype(call())> {
  try {
    return call();
  } catch (const Unusual&) {
    return std::nullopt;
  }
}

void need(bool usual) {
  if (!usual) throw Unusual();
}

class Tensor {
 public:
  explicit Tensor(py::handle object) {
    need(Py_TYPE(object.ptr()) == tensor_type || Py_TYPE(object.ptr()) == parameter_type);
    if (exchange->view(object.ptr(), &tensor_) != 0) {  // of a layout without strides, say
      PyErr_Clear();
      throw Unusual();
    }
    need(tensor_.device_type == cpu_device && tensor_.type.lanes == 1 && tensor_.data != nullptr);
    for (const Index size : shape()) size_ *= size;
    need(size_ > 0);
  }

  std::span<const Index> shape() const { return {tensor_.shape, static_cast<std::size_t>(tensor_.dimensions)}; }
  std::span<const Index> strides() const { return {tensor_.strides, static_cast<std::size_t>(tensor_.dimensions)}; }
  Index size() const { return size_; }
  int dimensions() const { return tensor_.dimensions; }

  template <class T>
  bool is() const {
    constexpr auto code = std::is_integral_v<T> ? dl_int : dl_float;
    return tensor_.type.code == code && tensor_.type.bits == 8 * sizeof(T);
  }
  template <class T>
  T* data() const {
    need(is<T>());
    char* const first = static_cast<char*>(tensor_.data) + tensor_.byte_offset;
    need(reinterpret_cast<std::uintptr_t>(first) % alignof(T) == 0);
    return reinterpret_cast<T*>(first);
  }

  bool is_contiguous() const {
    return is_ordered([&](int i) { return dimensions() - 1 - i; });
  }
  // The memory of a transposed contiguous tensor.
  bool is_transposed() const {
    return is_ordered([](int i) { return i; });
  }

  template <class T>
  T* contiguous(Index size) const {
    need(is_contiguous() && size_ == size);
    return data<T>();
  }

  bool lies_as(const Tensor& other) const {
    return std::ranges::equal(shape(), other.shape()) && std::ranges::equal(strides(), other.strides());
  }

  template <class T>
  View<T> matrix() const {
    need(dimensions() == 2);
    return {data<T>(), shape()[0], shape()[1], strides()[0], strides()[1]};
  }

  // All dimensions but the last as one.
  template <class T>
  View<T> rows() const {
    if (dimensions() == 2) return matrix<T>();
    need(dimensions() > 0 && is_contiguous());
    const Index columns = shape().back();
    return {data<T>(), size_ / columns, columns, columns, 1};
  }

 private:
  // Whether the dimensions at(0), at(1) ... are one behind the other, the first one's elements side by side.
  template <class At>
  bool is_ordered(At&& at) const {
    Index expected = 1;
    for (int i = 0; i < dimensions(); ++i) {
      const auto d = static_cast<std::size_t>(at(i));
      if (shape()[d] != 1 && strides()[d] != expected) return false;
      expected *= shape()[d];
    }
    return true;
  }

  DlTensor tensor_{};
  Index size_ = 1;
};

template <class Call>
auto for_dtype(const Tensor& a, Call&& call) {
  need(a.is<float>() || a.is<double>());
  return a.is<float>() ? call(float{}) : call(double{});
}

template <class T>
py::object new_tensor(std::vector<Index> shape) {
  DlTensor prototype{};
  prototype.device_type = cpu_device;
  prototype.dimensions = static_cast<std::int32_t>(shape.size());
  prototype.type = {dl_float, 8 * sizeof(T), 1};
  prototype.shape = shape.data();
  DlManaged* made = nullptr;
  const auto no_memory = [](void*, const char*, const char*) { PyErr_NoMemory(); };
  if (exchange->allocate(&prototype, &made, nullptr, no_memory) != 0) throw py::error_already_set();
  void* object = nullptr;
  if (exchange->object_from_managed(made, &object) != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

// Without modes of torch functions, such as torch.set_default_device's, as long as this lives: they run Python code where a
// storage is asked for.
class NoModes {
 public:
  NoModes() {
    if (!called(has_modes).is(py::handle(Py_True))) return;
    context_ = called(without_modes);
    context_.attr("__enter__")();
  }
  ~NoModes() {
    if (context_) Py_XDECREF(PyObject_CallMethod(context_.ptr(), "__exit__", nullptr));
  }
  NoModes(const NoModes&) = delete;

 private:
  static py::object called(PyObject* function) {
    PyObject* const result = PyObject_CallNoArgs(function);
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }
  py::object context_;
};

// A call before its kernel: no Python code runs from the making of this to run(), and so no other thread. Before CPython
// 3.12 a new object may start a collection, and with it anyone's callbacks and finalizers: there are none meanwhile.
class Preparation {
 public:
  Preparation() : collects_(PY_VERSION_HEX < 0x030c0000 && PyGC_Disable() != 0) {}
  ~Preparation() { end(); }
  Preparation(const Preparation&) = delete;

  // Holds the storages of tensors, or of lists and tuples of them, for a call without the GIL: `weight.data = other` in
  // another thread would free what a kernel reads. False where a call takes no longer than a few microseconds: it keeps
  // the GIL.
  template <class... Tensors>
  bool holds_if_long(Index multiply_adds, const Tensors&... tensors) {
    if (multiply_adds / tuning::multiply_adds_per_element < tuning::gil_release_elements) return false;
    const NoModes no_modes;
    storages_ = py::list();
    const auto add = [&](const auto& given) {
      if constexpr (std::is_same_v<decltype(given), const py::handle&>)
        add_storage(given);
      else
        for (const py::handle each : given) add_storage(each);
    };
    (add(tensors), ...);
    return true;
  }

  // Without the GIL if there are storages. They, and `objects`, are plain pointers meanwhile: see run() on why.
  template <class Call, class... Objects>
  void run(Call&& call, Objects&... objects) {
    end();
    if (!storages_) return call();
    const auto run = [&](auto&... each) {
      PyObject* const held[] = {each.release().ptr()...};
      const auto take_back = [&] {
        std::size_t i = 0;
        ((each = py::reinterpret_steal<std::remove_reference_t<decltype(each)>>(held[i++])), ...);
      };
      try {
        without_gil(call);
      } catch (const std::exception&) {
        take_back();
        throw;
      }
      take_back();
    };
    run(storages_, objects...);
  }

 private:
  void end() {
    if (std::exchange(collects_, false)) PyGC_Enable();
  }
  void add_storage(py::handle tensor) {
    if (tensor.is_none()) return;
    PyObject* const storage = PyObject_CallMethodNoArgs(tensor.ptr(), untyped_storage);
    if (storage == nullptr) {
      PyErr_Clear();
      throw Unusual();
    }
    py::reinterpret_borrow<py::list>(storages_).append(py::reinterpret_steal<py::object>(storage));
  }

  bool collects_;
  py::object storages_;  // a list
};

void use_torch(const py::capsule& api, const py::type& tensor, const py::type& parameter, py::handle modes,
               py::handle no_modes) {
  const auto* given = static_cast<const DlExchange*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
  if (given == nullptr) throw py::error_already_set();
  if (given->version.major != 1 || given->view == nullptr) refuse("api", "not DLPack 1.3");
  untyped_storage = PyUnicode_InternFromString("untyped_storage");
  if (untyped_storage == nullptr) throw py::error_already_set();
  has_modes = modes.inc_ref().ptr();
  without_modes = no_modes.inc_ref().ptr();
  exchange = given;
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.ptr());
}

// Optimizers.

// The counters of steps, which are tensors: all are at `step` - 1, and will be at `step`.
template <class T>
std::vector<T*> counters(const py::list& tensors, double step) {
  std::vector<T*> found;
  for (const py::handle each : tensors) {
    found.push_back(Tensor(each).contiguous<T>(1));
    need(static_cast<double>(*found.back()) == step - 1);
  }
  std::ranges::sort(found);
  need(std::ranges::adjacent_find(found) == found.end());  // PyTorch advances one of two parameters twice
  return found;
}

template <class Call>
bool with_counters(const py::list& tensors, double step, Call&& call) {
  const auto advance = [&](auto zero) {
    const auto found = counters<decltype(zero)>(tensors, step);
    call();
    for (auto* const each : found) *each = static_cast<decltype(zero)>(step);
    return true;
  };
  return tensors.empty() ? (call(), true) : for_dtype(Tensor(tensors[0]), advance);
}

template <class T>
struct Updated {
  T* param;
  const T* grad;
  T* state[max_states];
  Index size;
};

// PyTorch refuses numbers that the dtype does not reach.
template <class T>
void need_reached(const std::vector<double>& numbers) {
  constexpr auto largest = static_cast<double>(std::numeric_limits<T>::max());
  for (const double each : numbers) need(!(std::abs(each) > largest));
}

void check_rule(int rule, const std::vector<double>& hyperparameters) {
  checked_index(rule, optimizer_rule_names().size(), "rule");
  if (static_cast<int>(hyperparameters.size()) != optimizer_hyperparameter_count(rule))
    refuse("hyperparameters", "wrong number");
}

// Updates all parameters of one dtype; `states` are those of the first one, of the second one and so on.
auto torch_update(int rule, const std::vector<double>& hyperparameters, const py::list& params, const py::list& grads,
                  const py::list& states, const py::list& steps, double step) {
  check_rule(rule, hyperparameters);
  const auto count = static_cast<std::size_t>(optimizer_state_count(rule));
  if (grads.size() != params.size() || states.size() != count * params.size()) refuse("grads, states", "wrong number");
  return unless_unusual([&] {
    Preparation preparation;
    need(!params.empty());
    return for_dtype(Tensor(params[0]), [&](auto zero) {
      using T = decltype(zero);
      need_reached<T>(hyperparameters);
      std::vector<Updated<T>> all;
      const auto see = [&] {
        Index total = 0;
        all.clear();
        for (std::size_t i = 0; i < params.size(); ++i) {
          const Tensor param(params[i]), grad(grads[i]);
          need((param.is_contiguous() || param.is_transposed()) && grad.lies_as(param));
          Updated<T> one{param.data<T>(), grad.data<T>(), {}, param.size()};
          for (std::size_t s = 0; s < count; ++s) {
            const Tensor state(states[i * count + s]);
            need(state.lies_as(param));
            one.state[s] = state.data<T>();
          }
          all.push_back(one);
          total += one.size;
        }
        return total;
      };
      if (preparation.holds_if_long(see() * tuning::multiply_adds_per_element, params, grads, states, steps)) see();
      return with_counters(steps, step, [&] {
        preparation.run([&] {
          for (const Updated<T>& one : all)
            optimizer_update<T>(rule, one.param, one.grad, one.state, hyperparameters.data(), one.size);
        });
      });
    });
  });
}

// Networks: linear layers with their activations, and a loss.

struct TorchLayer {
  int activation;  // -1 is none
  double parameter;
  bool needs_x;
};

struct TorchLoss {
  int number;  // ~number is a row loss
  double parameter;
  bool is_mean, unit_interval;  // the latter: PyTorch refuses what is outside [0, 1]
};

struct TorchNetwork {
  std::vector<TorchLayer> layers;
  std::optional<TorchLoss> loss;
  KeptMemory memory;
};

constexpr const char* network_name = "gemmlet.TorchNetwork";

py::capsule torch_network(const std::vector<std::tuple<int, double, bool>>& layers,
                          const std::optional<std::tuple<int, double, bool, bool>>& loss) {
  auto made = std::make_unique<TorchNetwork>();
  if (layers.empty()) refuse("layers", "none");
  for (const auto& [activation, parameter, needs_x] : layers) {
    if (activation != -1) checked_index(activation, activation_names().size(), "layers");
    made->layers.push_back({activation, parameter, needs_x});
  }
  if (loss) {
    const auto [number, parameter, is_mean, unit_interval] = *loss;
    const bool of_rows = is_row_loss(number);
    checked_index(of_rows ? ~number : number, (of_rows ? row_loss_names() : loss_names()).size(), "loss");
    made->loss = {number, parameter, is_mean, unit_interval};
  }
  py::capsule capsule(made.get(), network_name, [](PyObject* object) {
    delete static_cast<TorchNetwork*>(PyCapsule_GetPointer(object, network_name));
  });
  made.release();
  return capsule;
}

TorchNetwork& network_of(const py::capsule& capsule) {
  if (!PyCapsule_IsValid(capsule.ptr(), network_name)) refuse("network", "not from torch_network()");
  return *capsule.get_pointer<TorchNetwork>();
}

// What a loss compares the outputs with. Class indices are copied: another thread may change those that were given.
template <class T>
struct TorchTargets {
  std::vector<Index> indices;
  const T* values = nullptr;

  TorchTargets(const TorchLoss& loss, const Tensor& target, Index rows, Index out) {
    if (is_row_loss(loss.number) && target.is<Index>()) {
      need(target.dimensions() == 1);
      const Index* given = target.contiguous<Index>(rows);
      indices.assign(given, given + rows);
      for (const Index each : indices) need(each >= 0 && each < out);  // PyTorch ignores some, and raises for others
    } else {
      need(target.dimensions() == 2 && target.shape()[0] == rows);
      values = target.contiguous<T>(rows * out);
      need(!loss.unit_interval || (within_unit_interval(values, target.size()) && is_finite(values, target.size())));
    }
  }
  const Index* index_data() const { return indices.empty() ? nullptr : indices.data(); }
};

// A step of fused training of parameters that lie as (in, out): the loss before it.
auto torch_train(const py::capsule& capsule, int rule, const std::vector<double>& hyperparameters, py::handle x,
                 py::handle target, bool skip_zeros, const py::list& params, const py::list& states,
                 const py::list& steps, double step) {
  TorchNetwork& network = network_of(capsule);
  check_rule(rule, hyperparameters);
  const auto count = static_cast<std::size_t>(optimizer_state_count(rule)), layer_count = network.layers.size();
  if (!network.loss) refuse("network", "no loss");
  if (params.size() != 2 * layer_count || states.size() != count * params.size())
    refuse("params, states", "wrong number");
  const TorchLoss& loss = *network.loss;
  return unless_unusual([&]() {
    Preparation preparation;
    Index weights = 0;
    for (std::size_t l = 0; l < layer_count; ++l) weights += Tensor(params[2 * l]).size();
    const Tensor given(x);
    need(given.dimensions() == 2);
    preparation.holds_if_long(3 * given.shape()[0] * weights, x, target, params, states, steps);
    const Tensor samples(x), wanted(target);
    return for_dtype(samples, [&](auto zero) {
      using T = decltype(zero);
      need_reached<T>(hyperparameters);
      Overlaps overlaps;
      const auto written = [&](const Tensor& tensor) {
        T* const data = tensor.data<T>();
        overlaps.add(data, tensor.size() * static_cast<Index>(sizeof(T)), true);
        return data;
      };
      const auto parameter = [&](std::size_t i, const Tensor& value) {
        need(value.is_transposed());
        Parameter<T> made{written(value), {}, nullptr};
        need(!loss.unit_interval || is_finite(made.value, value.size()));  // else a prediction might be NaN
        for (std::size_t s = 0; s < count; ++s) {
          const Tensor state(states[i * count + s]);
          need(state.lies_as(value));
          made.state[s] = written(state);
        }
        return made;
      };
      Plan<T> plan{};
      std::vector<Layer<T>> layers;
      for (std::size_t l = 0; l < layer_count; ++l) {
        const Tensor weight(params[2 * l]), bias(params[2 * l + 1]);
        need(weight.dimensions() == 2 && bias.dimensions() == 1 && bias.size() == weight.shape()[0]);
        const Index out = weight.shape()[0], in = weight.shape()[1];
        need(l == 0 || layers.back().out == in);
        const auto& [activation, number, needs_x] = network.layers[l];
        layers.push_back(
            {in, out, parameter(2 * l, weight), parameter(2 * l + 1, bias), out, activation, static_cast<T>(number)});
      }
      const Index features = layers.front().in, out = layers.back().out;
      need(samples.dimensions() == 2 && samples.shape()[1] == features);
      const Index rows = samples.shape()[0];
      // Of several rows numbers take as long to list as to multiply. A zero would hide a weight that is not finite.
      skip_zeros =
          skip_zeros && rows == 1 && is_finite(layers.front().weight.value, layers.front().in * layers.front().out);
      plan.samples = {features,  samples.contiguous<T>(rows * features), nullptr, nullptr, nullptr, nullptr, T(1), T(0),
                      skip_zeros};
      overlaps.add(plan.samples.values, rows * features * static_cast<Index>(sizeof(T)), false);
      const TorchTargets<T> targets(loss, wanted, rows, out);
      need(!loss.unit_interval || is_finite(plan.samples.values, samples.size()));
      if (targets.values != nullptr) overlaps.add(targets.values, rows * out * static_cast<Index>(sizeof(T)), false);
      need(!overlaps.found());
      // The objective is a sum over rows, divided by their number.
      const auto n = static_cast<double>(rows);
      const double weight = !loss.is_mean ? n : is_row_loss(loss.number) ? 1 : 1 / static_cast<double>(out);
      constexpr double unlimited = std::numeric_limits<double>::infinity();
      plan.losses.push_back(
          {loss.number, loss.parameter, weight, {targets.index_data(), targets.values, {}}, -unlimited, unlimited});
      plan.networks.push_back(std::move(layers));
      plan.phases = {{Phase::forward, 0, {samples_source}, -1, -1},
                     {Phase::loss, 0, {}, -1, -1},
                     {Phase::backward, 0, {}, -1, -1},
                     {Phase::update, 0, {}, -1, rule}};
      std::vector<Index> order(static_cast<std::size_t>(rows));
      std::iota(order.begin(), order.end(), Index{0});
      Batches<T> batches{};
      static_cast<Steps&>(batches) = {order.data(), rows, rows};
      batches.hyperparameters = {hyperparameters.data()};
      double sum = 0;
      with_counters(steps, step, [&] {
        preparation.run([&] {
          KeptMemory own;
          const std::unique_lock lock(network.memory.used, std::try_to_lock);
          sum = gemmlet::train(plan, batches, {0.0}, lock ? network.memory : own).losses[0];
        });
      });
      return sum / n;
    });
  });
}

// What a forward pass leaves in one block of memory, by its offset, -1 where it does not: of each layer but the last the
// outputs, of each whose gradient needs it the preactivation too; with a loss also the last layer's outputs, and the
// gradient of the loss. Behind all of that the biases, side by side: they may be changed until a second derivative reads
// them.
struct Kept {
  std::vector<Index> bias, y, z;
  Index gradient = -1, size = 0;

  template <class T>
  Kept(const TorchNetwork& network, const std::vector<View<T>>& weights, Index rows) {
    for (std::size_t l = 0; l < weights.size(); ++l) {
      y.push_back(take(l + 1 < weights.size() || network.loss, rows * weights[l].rows));
      z.push_back(take(network.layers[l].needs_x, rows * weights[l].rows));
    }
    gradient = take(network.loss.has_value(), rows * weights.back().rows);
    for (const View<T>& w : weights) bias.push_back(take(true, w.rows));
  }

 private:
  Index take(bool there, Index count) { return there ? std::exchange(size, size + count) : -1; }
};

// The arguments of a forward pass, checked: x, then weight and bias (or None) of each layer, then the targets of a loss.
template <class T>
struct Inputs {
  Tensor x;
  View<T> rows;
  std::vector<View<T>> weights;  // (out, in)
  std::vector<const T*> biases;
  Index multiply_adds = 0;

  Inputs(const TorchNetwork& network, const py::tuple& inputs) : x(inputs[0]), rows(x.template rows<T>()) {
    for (std::size_t l = 0; l < network.layers.size(); ++l) {
      weights.push_back(Tensor(inputs[1 + 2 * l]).matrix<T>());
      need(weights[l].columns == (l == 0 ? rows.columns : weights[l - 1].rows));
      const py::object bias = inputs[2 + 2 * l];
      biases.push_back(bias.is_none() ? nullptr : bias_data(bias, weights[l].rows));
      multiply_adds += rows.rows * weights[l].rows * weights[l].columns;
    }
  }
  // The shape of x, with so many columns.
  std::vector<Index> shape(Index columns) const {
    std::vector<Index> shape(x.shape().begin(), x.shape().end());
    shape.back() = columns;
    return shape;
  }

 private:
  static const T* bias_data(const py::object& object, Index size) {
    const Tensor bias(object);
    need(bias.dimensions() == 1);
    return bias.contiguous<T>(size);
  }
};

void check_inputs(const TorchNetwork& network, const py::tuple& inputs) {
  if (inputs.size() != 1 + 2 * network.layers.size() + (network.loss ? 1 : 0)) refuse("inputs", "wrong number");
}

// (the outputs, or the loss, and what backward takes; None unless `keep`).
auto torch_forward(const py::capsule& capsule, const py::tuple& inputs, bool keep) {
  const TorchNetwork& network = network_of(capsule);
  check_inputs(network, inputs);
  return unless_unusual([&] {
    Preparation preparation;
    return for_dtype(Tensor(inputs[0]), [&](auto zero) {
      using T = decltype(zero);
      Inputs<T> in(network, inputs);
      if (preparation.holds_if_long(in.multiply_adds, inputs)) in = Inputs<T>(network, inputs);
      const Index rows = in.rows.rows, out = in.weights.back().rows;
      std::optional<TorchTargets<T>> targets;
      if (network.loss) {
        need(in.x.dimensions() == 2);
        targets.emplace(*network.loss, Tensor(inputs[inputs.size() - 1]), rows, out);
      }
      const Kept kept(network, in.weights, rows);
      py::object result = new_tensor<T>(network.loss ? std::vector<Index>{} : in.shape(out));
      py::object block = keep ? new_tensor<T>({std::max(kept.size, Index{1})}) : py::none();
      Buffer<T> own;
      if (!keep) own = space<T>(kept.size);
      T *const to = Tensor(result).data<T>(), *const memory = keep ? Tensor(block).data<T>() : own.get();
      const auto at = [&](Index offset) { return offset < 0 ? nullptr : memory + offset; };
      const auto compute = [&] {
        View<T> x = in.rows;
        for (std::size_t l = 0; l < in.weights.size(); ++l) {
          const TorchLayer& layer = network.layers[l];
          if (keep && in.biases[l] != nullptr) std::copy_n(in.biases[l], in.weights[l].rows, at(kept.bias[l]));
          T* const y = kept.y[l] < 0 ? to : at(kept.y[l]);
          linear<T>(x, in.weights[l].transposed(), in.biases[l], layer.activation, static_cast<T>(layer.parameter), y,
                    at(kept.z[l]));
          x = {y, rows, in.weights[l].rows, in.weights[l].rows, 1};
        }
        if (!network.loss) return;
        const auto [number, parameter, is_mean, unit_interval] = *network.loss;
        const double loss = is_row_loss(number)
                                ? row_loss<T>(~number, x.data, targets->index_data(), targets->values, parameter,
                                              at(kept.gradient), rows, out)
                                : elementwise_loss<T>(number, x.data, targets->values, static_cast<T>(parameter),
                                                      at(kept.gradient), rows * out);
        *to = static_cast<T>(loss);
      };
      preparation.run(compute, result, block);
      need(!network.loss || !network.loss->unit_interval || !std::isnan(*to));
      return std::pair{result, block};
    });
  });
}

// The gradients of the inputs but the targets, None where `needed` says so, from that of the result. `y` is the result of a
// network without a loss, None if the last activation's gradient does not depend on it.
auto torch_backward(const py::capsule& capsule, py::handle grad_result, const py::tuple& inputs, py::handle block,
                    py::handle y, const std::vector<bool>& needed) {
  const TorchNetwork& network = network_of(capsule);
  check_inputs(network, inputs);
  const std::size_t count = network.layers.size();
  if (needed.size() != 1 + 2 * count) refuse("needed", "wrong number");
  return unless_unusual([&] {
    Preparation preparation;
    return for_dtype(Tensor(inputs[0]), [&](auto zero) {
      using T = decltype(zero);
      Inputs<T> in(network, inputs);
      if (preparation.holds_if_long(2 * in.multiply_adds, grad_result, inputs, block, y))
        in = Inputs<T>(network, inputs);
      const Index rows = in.rows.rows, out = in.weights.back().rows;
      const Kept kept(network, in.weights, rows);
      const T* const memory = Tensor(block).contiguous<T>(std::max(kept.size, Index{1}));
      const T* const result = y.is_none() ? nullptr : Tensor(y).contiguous<T>(rows * out);
      const TorchLayer& last = network.layers.back();
      need(network.loss || last.activation < 0 || last.needs_x || result != nullptr);
      const Tensor given(grad_result);
      // Of the loss, which is a number, or of the outputs.
      const View<T> top = network.loss ? View<T>{given.contiguous<T>(1), 1, 1, 1, 1} : given.rows<T>();
      need(network.loss || (top.rows == rows && top.columns == out));

      py::list grads;
      std::vector<T*> to;
      std::size_t lowest = count;  // the first layer with a parameter, or an input, that needs its gradient
      for (std::size_t i = 0; i < needed.size(); ++i) {
        const std::size_t l = i == 0 ? 0 : (i - 1) / 2;
        if (needed[i]) lowest = std::min(lowest, l);
        const View<T>& w = in.weights[l];
        py::object grad = py::none();
        if (needed[i])
          grad = i == 0       ? new_tensor<T>(in.shape(w.columns))
                 : i % 2 == 1 ? new_tensor<T>({w.rows, w.columns})
                              : new_tensor<T>({w.rows});
        to.push_back(needed[i] ? Tensor(grad).data<T>() : nullptr);
        grads.append(std::move(grad));
      }
      Index widest = 0;
      for (const View<T>& w : in.weights) widest = std::max(widest, w.rows);
      Buffer<T> own[2] = {space<T>(rows * widest), space<T>(rows * widest)};
      const auto compute = [&] {
        View<T> grad = top;
        std::size_t next = 0;
        const auto own_rows = [&](Index columns) { return View<T>{own[next ^= 1].get(), rows, columns, columns, 1}; };
        const auto data = [](const View<T>& v) { return const_cast<T*>(v.data); };
        if (network.loss) {
          const View<T> of_loss{memory + kept.gradient, rows * out, 1, 1, 1};
          grad = {of_loss.data, rows, out, out, 1};
          if (*top.data != T(1)) {  // a matmul with one number
            grad = own_rows(out);
            linear<T>(of_loss, top, nullptr, -1, T(0), data(grad), nullptr);
          }
        }
        for (std::size_t l = count; l-- > lowest;) {
          const TorchLayer& layer = network.layers[l];
          const View<T>& w = in.weights[l];
          if (layer.activation >= 0) {
            const T* const saved = kept.z[l] >= 0 ? memory + kept.z[l] : kept.y[l] >= 0 ? memory + kept.y[l] : result;
            const View<T> grad_z = own_rows(w.rows);
            activation_backward<T>(layer.activation, grad.data, saved, static_cast<T>(layer.parameter), data(grad_z),
                                   rows * w.rows);
            grad = grad_z;
          }
          const View<T> x = l == 0 ? in.rows : View<T>{memory + kept.y[l - 1], rows, w.columns, w.columns, 1};
          if (T* const grad_w = to[1 + 2 * l]) linear<T>(grad.transposed(), x, nullptr, -1, T(0), grad_w, nullptr);
          if (T* const grad_b = to[2 + 2 * l]) column_sum<T>(grad, grad_b);
          if (l > lowest || (l == 0 && to[0] != nullptr)) {
            const View<T> grad_x = l == 0 ? View<T>{to[0], rows, w.columns, w.columns, 1} : own_rows(w.columns);
            linear<T>(grad, w, nullptr, -1, T(0), data(grad_x), nullptr);
            grad = grad_x;
          }
        }
      };
      preparation.run(compute, grads);
      return grads;
    });
  });
}

}  // namespace

void bind_torch(py::module_& m) {
  def(m, "use_torch", &use_torch, "api", "tensor", "parameter", "modes", "no_modes");
  def(m, "torch_update", &torch_update, "rule", "hyperparameters", "params", "grads", "states", "steps", "step");
  def(m, "torch_network", &torch_network, "layers", "loss");
  def(m, "torch_train", &torch_train, "network", "rule", "hyperparameters", "x", "target", "skip_zeros", "params",
      "states", "steps", "step");
  def(m, "torch_forward", &torch_forward, "network", "inputs", "keep");
  def(m, "torch_backward", &torch_backward, "network", "grad", "inputs", "kept", "y", "needed");
}

}  // namespace gemmlet::bindings
