// The layers of one network: forward and backward of some rows, update of some weights.
//
// Contract
//   Any division of rows and weights among threads gives the same bits. A barrier separates backward of all rows from the
//   update, and the update from the next forward.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "cpu/threads.h"
#include "cpu/training/dropout.h"
#include "cpu/training/packed.h"
#include "formulas/activations.h"

namespace gemmlet {
namespace {

template <class Activation>
constexpr bool needs_all_outputs = !(Activation::needs_x || requires { Activation::needs_sign_alone; });

// Parameters and activations of one network. The first layer's activations are double-buffered: one set for each slot.
// With dropout a layer reads what is left of the activations below: in rows of their own, where backward needs all. Of the
// first layer's inputs, where there are two slots, the loader drops some.
template <class T>
class Network {
 public:
  Network(const std::vector<Layer<T>>& layers, KeptMemory& memory, Index max_rows, Index slots = 1)
      : layers_(layers), max_rows_(max_rows) {
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const Layer<T>& layer = layers[l];
      const bool dropped = layer.dropout && (l > 0 || slots == 1);
      kept_.push_back(dropped ? KeptUnits(memory, layer.dropout, max_rows, layer.in) : KeptUnits());
      const bool needs_all = dropped && l > 0 && activation_needs_all(layers[l - 1].activation);
      left_.push_back(needs_all ? Rows<T>(memory, max_rows, layer.in) : Rows<T>());
    }
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const Index rows = l == 0 ? slots * max_rows : max_rows;
      y_.emplace_back(memory, rows, layers[l].out);
      z_.push_back(activation_needs_x(layers[l].activation) ? Rows<T>(memory, rows, layers[l].out) : Rows<T>());
      grad_.emplace_back(memory, max_rows, layers[l].out);
      x_rows_.emplace_back(static_cast<std::size_t>(rows));
      if (l + 1 == layers.size() || left_[l + 1].stride == 0) {
        y_[l].point(x_rows_[l].data(), 0, rows);
      } else {
        for (Index first = 0; first < rows; first += max_rows)
          left_[l + 1].point(x_rows_[l].data() + first, 0, max_rows);
      }
    }
  }

  // Row `row` of the outputs, and the gradients of the outputs, which the caller writes between forward and backward.
  const T* outputs(Index slot, Index row) const {
    return y_.back().row(row + (layers_.size() == 1 ? slot * max_rows_ : 0));
  }
  const Rows<T>& output_gradients() const { return grad_.back(); }

  Index output_width() const { return layers_.back().out; }

  const Layer<T>& first_layer() const { return layers_[0]; }

  // The first layer's preactivations of some rows and columns; `layer` is first_layer() or a ThreadColumns' layer.
  void forward_first(const Layer<T>& layer, const Inputs<T>& inputs, Index slot, Range rows, Range columns,
                     const Workspace<T>* workspace) const {
    const Rows<T>& target = preactivations(0);
    T *const first_row = target.row(slot * max_rows_ + rows.first), *to = first_row;
    const bool sparse = inputs.if_sparse([&](const auto& x) {
      forward_sparse(x.rows.data() + rows.first, rows.size(), layer, columns, to, target.stride);
    });
    if (!sparse && workspace != nullptr)
      multiply_packed<T>({inputs.copies.row(rows.first), inputs.copies.stride, 1}, rows.size(),
                         weights(layer).block(0, layer.in, columns.first, columns.size()),
                         layer.bias.value + columns.first, to + columns.first, target.stride, *workspace,
                         [](Index, Index, Index, Index) {});
    else if (!sparse)
      for (Index first = rows.first; first < rows.end;
           first += tuning::row_block, to += tuning::row_block * target.stride)
        forward_dense(inputs.rows.data() + first, std::min(tuning::row_block, rows.end - first), layer, columns, to,
                      target.stride);
    if (layer.classes > 0)
      add_class_rows(inputs.labels.data() + rows.first, rows.size(), layer, columns, first_row, target.stride);
  }

  bool has_dropout() const {
    return std::any_of(kept_.begin(), kept_.end(), [](const KeptUnits& kept) { return bool(kept); });
  }

  // Draws what rows of one of the inputs keep: before forward, by which they are read in whole.
  void draw_dropout(Range rows, const Draw& draw) const {
    if (rows.size() == 0 || !has_dropout()) return;
    const std::uint64_t place = draw.place(rows.first);
    for (const KeptUnits& kept : kept_)
      for (Index i = 0; kept && i < rows.size(); ++i)
        kept.draw(rows.first + i, place + static_cast<std::uint64_t>(i), draw);
  }

  // A row of the inputs of layer l without what is dropped; `row` does not count slots.
  void drop(std::size_t l, Index row, const T* from, T* to, Range columns) const {
    kept_[l].apply(row, from, to, columns);
  }

  // Everything after the first layer's preactivations, for some rows.
  void forward_rest(Index slot, Range rows) const {
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const Layer<T>& layer = layers_[l];
      const Index at = rows.first + (l == 0 ? slot * max_rows_ : 0);
      const Rows<T>& z = preactivations(l);
      if (l > 0) {
        const Index below = rows.first + (l == 1 ? slot * max_rows_ : 0);
        forward_dense(x_rows_[l - 1].data() + below, rows.size(), layer, {0, layer.out}, z.row(at), z.stride);
      }
      if (layer.activation >= 0)
        for_chunks(rows.size() * z.stride, [&](Index i, Index n) {
          activation_forward(layer.activation, z.row(at) + i, layer.activation_parameter, y_[l].row(at) + i, n);
        });
      for (Index i = 0; drops_outputs(l) && i < rows.size(); ++i)
        drop_outputs(l, rows.first + i, y_[l].row(at + i), {0, layer.out});
    }
  }

  // forward_first, forward_rest and backward of a whole mini-batch, by a team that meets after each layer. Inputs are
  // `inputs.copies`, or sparse.
  void forward_first_together(const Member& member, const Inputs<T>& inputs, Index slot, Index rows,
                              const Workspace<T>& workspace) const {
    const Part part = part_of_results(member, rows, layers_[0].out);
    forward_first(layers_[0], inputs, slot, part.rows, part.columns, &workspace);
  }

  void forward_rest_together(Member& member, Index slot, Index rows, const Workspace<T>& workspace) const {
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const Layer<T>& layer = layers_[l];
      const Part part = part_of_results(member, rows, layer.out);
      const Index first = l == 0 ? slot * max_rows_ : 0;
      if (l == 0) {
        for (Index i = part.rows.first; i < part.rows.end; ++i) activate(l, first, i, part.columns);
      } else {
        const bool is_left = left_[l].stride > 0;
        const Rows<T>&x = is_left ? left_[l] : y_[l - 1], &z = preactivations(l);
        const Index x_first = part.rows.first + (l == 1 && !is_left ? slot * max_rows_ : 0);
        multiply_packed<T>({x.row(x_first), x.stride, 1}, part.rows.size(),
                           weights(layer).block(0, layer.in, part.columns.first, part.columns.size()),
                           layer.bias.value + part.columns.first, z.row(part.rows.first) + part.columns.first, z.stride,
                           workspace, [&](Index row, Index count, Index column, Index columns) {
                             const Index j = part.columns.first + column;
                             for (Index i = row; i < row + count; ++i)
                               activate(l, 0, part.rows.first + i, {j, j + columns});
                           });
      }
      member.barrier();
    }
  }

  void backward_together(Member& member, Index slot, Index rows, const Rows<T>* input_gradients,
                         const Workspace<T>& workspace) const {
    {
      const Part part = part_of_results(member, rows, output_width());
      for (Index i = part.rows.first; i < part.rows.end; ++i) deactivate(layers_.size() - 1, slot, i, part.columns);
      member.barrier();
    }
    for (std::size_t l = layers_.size(); l-- > 0;) {
      const Layer<T>& layer = layers_[l];
      const Rows<T>&grad = grad_[l], *below = l > 0 ? &grad_[l - 1] : input_gradients;
      if (below == nullptr) return;
      const Part part = part_of_results(member, rows, layer.in);
      const Strided<T> x{grad.row(part.rows.first), grad.stride, 1};
      const View<T> w = weights(layer).transposed().block(0, layer.out, part.columns.first, part.columns.size());
      T* const y = below->row(part.rows.first) + part.columns.first;
      // For rows of the part, and some of its columns.
      const auto finish = [&](Index row, Index count, Index column, Index columns) {
        const Index j = part.columns.first + column;
        for (Index i = part.rows.first + row; i < part.rows.first + row + count; ++i) {
          if (kept_[l]) drop(l, i, below->row(i), below->row(i), {j, j + columns});
          if (l > 0) deactivate(l - 1, slot, i, {j, j + columns});
        }
      };
      if (part.rows.size() <= tuning::transposed_max_rows) {
        multiply_transposed(x, part.rows.size(), w, y, below->stride, workspace);
        finish(0, part.rows.size(), 0, part.columns.size());
      } else {
        multiply_packed<T>(x, part.rows.size(), w, nullptr, y, below->stride, workspace, finish);
      }
      member.barrier();
    }
  }

  // From the gradients of the outputs to those of every layer's preactivations, and of the inputs unless null, for some
  // rows of a mini-batch of batch_rows.
  void backward(Index slot, Range rows, Index batch_rows, const Rows<T>* input_gradients) const {
    // Chosen by the mini-batch, not by the rows of this call: the two reduce in different orders.
    const auto backward_inputs = batch_rows < tuning::tiles_min_rows ? backward_dot_products<T> : backward_tiles<T>;
    for (std::size_t l = layers_.size(); l-- > 0;) {
      const Layer<T>& layer = layers_[l];
      T* grad = grad_[l].row(rows.first);
      if (layer.activation >= 0) {
        const T* saved = (z_[l].stride > 0 ? z_[l] : y_[l]).row(rows.first + (l == 0 ? slot * max_rows_ : 0));
        for_chunks(rows.size() * grad_[l].stride, [&](Index i, Index n) {
          activation_backward(layer.activation, grad + i, saved + i, layer.activation_parameter, grad + i, n);
        });
      }
      const Rows<T>* below = l > 0 ? &grad_[l - 1] : input_gradients;
      if (below == nullptr) continue;
      backward_inputs(grad, grad_[l].stride, rows.size(), layer, below->row(rows.first), below->stride);
      for (Index i = rows.first; kept_[l] && i < rows.end; ++i) drop(l, i, below->row(i), below->row(i), {0, layer.in});
    }
  }

  // The gradient penalty of some samples. Its gradient by a layer's weights is a product of two rows for each sample, which
  // the update adds to those of the rows of the mini-batch; they are left in the rows from `base` on:
  //   inputs (`gradients`, to which x points)  dD/dx
  //   activations                              what the layers make of that without biases, by the slopes at the sample
  //   gradients                                scale * dD/dz of each layer's preactivation z
  // Without pipeline, where activations are linear in pieces.
  void penalize(Range samples, Index base, Index batch_rows, T scale, const Rows<T>& gradients, const T* const* x,
                const T* zeros) const {
    const Range rows{base + samples.first, base + samples.end};
    for (const Rows<T>& y : y_) std::copy_n(y.row(samples.first), samples.size() * y.stride, y.row(rows.first));
    for (Index i = rows.first; i < rows.end; ++i) {
      T* const grad = grad_.back().row(i);
      std::fill_n(grad, grad_.back().stride, T(0));
      grad[0] = T(1);
    }
    backward(0, rows, batch_rows, &gradients);
    for (std::size_t l = 0; l + 1 < layers_.size(); ++l) {
      Layer<T> linear = layers_[l];
      linear.bias.value = const_cast<T*>(zeros);
      T* const y = y_[l].row(rows.first);
      forward_dense(l == 0 ? x + rows.first : x_rows_[l - 1].data() + rows.first, rows.size(), linear, {0, linear.out},
                    y, y_[l].stride);
      if (linear.activation >= 0)
        for_chunks(rows.size() * y_[l].stride, [&](Index i, Index n) {
          activation_backward(linear.activation, y + i, y_[l].row(samples.first) + i, linear.activation_parameter,
                              y + i, n);
        });
    }
    for (const Rows<T>& grad : grad_)
      for (Index i = 0; i < rows.size() * grad.stride; ++i) grad.row(rows.first)[i] *= scale;
  }

  // The sums of the squared weights and of their sizes, each unless it is null, by columns of vectors of all layers, each of
  // which belongs to one member, as columns of the first layer may do.
  Index vectors() const {
    Index count = 0;
    for (const Layer<T>& layer : layers_) count += ceil_div(layer.out, lanes<T>);
    return count;
  }
  void sum_weights(const Layer<T>& first_layer, Index index, Index count, Range first_columns, double* squares,
                   double* sizes) const {
    Index vector = 0;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const Layer<T>& layer = l == 0 ? first_layer : layers_[l];
      for (Index j = 0; j < layer.out; j += lanes<T>, ++vector) {
        const bool by_columns = l == 0 && first_columns.size() > 0;
        if (by_columns ? j < first_columns.first || j >= first_columns.end : vector % count != index) continue;
        const auto part = static_cast<int>(std::min<Index>(layer.out - j, lanes<T>));
        const auto total = [&](auto&& add) {
          DoubleSum<T> even{}, odd{};
          const auto weights = [&](Index k) { return load_lanes(layer.weight.value + k * layer.stride + j, part); };
          const Index weight_rows = layer.in + layer.classes;
          for (Index k = 0; k + 1 < weight_rows; k += 2) {
            add(even, weights(k));
            add(odd, weights(k + 1));
          }
          if (weight_rows % 2 != 0) add(even, weights(weight_rows - 1));
          return even.total() + odd.total();
        };
        if (squares != nullptr) squares[vector] = total([](DoubleSum<T>& sum, Vec<T> w) { sum.add_product(w, w); });
        if (sizes != nullptr) sizes[vector] = total([](DoubleSum<T>& sum, Vec<T> w) { sum.add(abs(w)); });
      }
    }
  }

  // Updates part `index` of `count` of all weights from the inputs, activations and gradients of `rows` rows, and of those
  // that gradient penalties have left after them. The first layer's part is first_columns, unless that is empty.
  template <class UpdateRule>
  void update(const Layer<T>& first_layer, const Inputs<T>& inputs, Index slot, Index rows, Index penalty_rows,
              Index index, Index count, Range first_columns, const Workspace<T>* workspace,
              const double* hyperparameters, const Adjustment& adjustment, double average_decay) const {
    double of_weights[UpdateRule::hyperparameter_count], of_biases[UpdateRule::hyperparameter_count];
    adjustment.fill<UpdateRule>(hyperparameters, of_weights, of_biases);
    const bool has_average = first_layer.weight.average != nullptr;
    const UpdateEpilogue<T, UpdateRule> update(of_weights, average_decay, has_average);
    const UpdateEpilogue<T, UpdateRule> update_of_bias(of_biases, average_decay, has_average);
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const Layer<T>& layer = l == 0 ? first_layer : layers_[l];
      const bool by_columns = l == 0 && first_columns.size() > 0;
      const Range columns = by_columns ? first_columns : Range{0, layer.out};
      const Range inputs_part = by_columns ? Range{0, layer.in} : part_of(layer.in, index, count);
      if (by_columns || index == static_cast<Index>(l) % count)
        update_bias(layer, grad_[l], rows, columns, update_of_bias);
      const bool sparse = l == 0 && inputs.if_sparse([&](const auto& x) {
        // Rules with states are never idle.
        if constexpr (UpdateRule::state_count == 0)
          if (rows == 1 && update.idle_without_gradient) {
            if (by_columns || index == 0) update_from_row(layer, x.rows[0], grad_[0], columns, update);
            return;
          }
        if (by_columns) {
          update_sparse(layer, x.features, grad_[0], {0, layer.in}, columns, update);
        } else {
          // Round-robin over blocks: their numbers of nonzeros differ.
          for (Index block = index; block < ceil_div(layer.in, block_features); block += count) {
            const Index first = block * block_features;
            update_sparse(layer, x.features, grad_[0], {first, std::min(layer.in, first + block_features)}, columns,
                          update);
          }
        }
      });
      if (!sparse) {
        const T* const* x = l == 0 ? inputs.rows.data() : x_rows_[l - 1].data() + (l == 1 ? slot * max_rows_ : 0);
        if (workspace != nullptr)
          update_packed(layer, x, grad_[l], rows + penalty_rows, inputs_part, columns, *workspace, update);
        else
          update_dense(layer, x, grad_[l], rows + penalty_rows, inputs_part, columns, update);
      }
      if (layer.classes > 0)
        update_class_rows(layer, inputs.labels.data(), grad_[l], rows, part_of(layer.classes, index, count), columns,
                          update);
    }
  }

  // The same by the rule's number; `is_adjusted` is Adjustment::needs_rule.
  void update(int rule, bool is_adjusted, const auto&... arguments) const {
    using Function = void (*)(const Network&, decltype(arguments)...);
#define GEMMLET_FUNCTION(...) \
  [](const Network& self, decltype(arguments)... a) { self.template update<__VA_ARGS__>(a...); }
#define GEMMLET_ENTRY(name) \
  {GEMMLET_FUNCTION(optimizers::name), GEMMLET_FUNCTION(optimizers::adjusted<optimizers::name>)},
    static constexpr Function table[][2] = {GEMMLET_OPTIMIZER_RULES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
#undef GEMMLET_FUNCTION
    table[rule][is_adjusted](*this, arguments...);
  }

  // Multiply-adds of one row, forward.
  double work() const {
    double total = 0;
    for (const Layer<T>& layer : layers_) total += static_cast<double>(layer.in) * static_cast<double>(layer.out);
    return total;
  }

  Index max_out() const {
    Index out = 1;
    for (const Layer<T>& layer : layers_) out = std::max(out, layer.out);
    return out;
  }

  // The longest sum of a layer, over inputs, outputs or rows.
  Index max_k() const {
    Index k = max_rows_;
    for (const Layer<T>& layer : layers_) k = std::max({k, layer.in, layer.out});
    return k;
  }

  // The columns of the first layer that belong to member `index` of `count` for the whole call, so that they stay in its
  // cache: two vectors or more. None if the columns cannot be divided evenly enough.
  Range first_columns(Index index, Index count) const {
    const Index whole = layers_[0].out / lanes<T>;
    if (whole < 2 * count || (whole % count != 0 && whole < 4 * count)) return {0, 0};
    const Range part = part_of(whole, index, count);
    return {part.first * lanes<T>, index + 1 == count ? layers_[0].out : part.end * lanes<T>};
  }

 private:
  // A member's part of results (rows, columns): columns, unless there are few.
  struct Part {
    Range rows, columns;
  };
  static Part part_of_results(const Member& member, Index rows, Index columns) {
    const Index index = member.index(), count = member.count(), panels = ceil_div(columns, nr<T>);
    if (panels < 2 * count) return {part_of(rows, index, count), {0, columns}};
    const Range part = part_of(panels, index, count);
    return {{0, rows}, {part.first * nr<T>, std::min(columns, part.end * nr<T>)}};
  }

  static View<T> weights(const Layer<T>& layer) { return {layer.weight.value, layer.in, layer.out, layer.stride, 1}; }

  // Whether the next layer drops outputs of layer l.
  bool drops_outputs(std::size_t l) const { return l + 1 < layers_.size() && kept_[l + 1]; }
  void drop_outputs(std::size_t l, Index row, T* y, Range columns) const {
    drop(l + 1, row, y, left_[l + 1].stride > 0 ? left_[l + 1].row(row) : y, columns);
  }

  // The activation of some columns of a row, with dropout, and its gradient; `first` is the first row of a slot.
  void activate(std::size_t l, Index first, Index row, Range columns) const {
    const Layer<T>& layer = layers_[l];
    T* const y = y_[l].row(first + row);
    if (layer.activation >= 0)
      for_chunks(columns.size(), [&](Index i, Index n) {
        const Index j = columns.first + i;
        activation_forward(layer.activation, preactivations(l).row(first + row) + j, layer.activation_parameter, y + j,
                           n);
      });
    if (drops_outputs(l)) drop_outputs(l, row, y, columns);
  }
  void deactivate(std::size_t l, Index slot, Index row, Range columns) const {
    const Layer<T>& layer = layers_[l];
    if (layer.activation < 0) return;
    const Rows<T>& saved = z_[l].stride > 0 ? z_[l] : y_[l];
    for_chunks(columns.size(), [&](Index i, Index n) {
      const Index j = columns.first + i;
      T* const grad = grad_[l].row(row) + j;
      activation_backward(layer.activation, grad, saved.row(row + (l == 0 ? slot * max_rows_ : 0)) + j,
                          layer.activation_parameter, grad, n);
    });
  }

  const Rows<T>& preactivations(std::size_t l) const { return z_[l].stride > 0 ? z_[l] : y_[l]; }

  // Chunks that elementwise functions compute on the calling thread: this runs inside a task.
  template <class F>
  static void for_chunks(Index n, F&& f) {
    for (Index at = 0; at < n; at += tuning::costly_chunk) f(at, std::min(tuning::costly_chunk, n - at));
  }

  static bool activation_needs_x(int activation) {
#define GEMMLET_ENTRY(name) activations::name::needs_x,
    static constexpr bool table[] = {GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
    return activation >= 0 && table[activation];
  }

  // Whether backward needs outputs as they were before dropout.
  static bool activation_needs_all(int activation) {
#define GEMMLET_ENTRY(name) needs_all_outputs<activations::name>,
    static constexpr bool table[] = {GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
    return activation >= 0 && table[activation];
  }

  const std::vector<Layer<T>>& layers_;
  Index max_rows_;
  std::vector<Rows<T>> y_, z_, grad_;
  std::vector<std::vector<const T*>> x_rows_;  // by layer, what the next one reads: rows of y_ or left_
  std::vector<Rows<T>> left_;                  // of a layer's inputs, after dropout
  std::vector<KeptUnits> kept_;
};

}  // namespace
}  // namespace gemmlet
