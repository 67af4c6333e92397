// All steps of a layer in one launch, weights in registers (kernels.h says how it is cut up,
// workers.cuh how steps hand on what the next one needs).
#pragma once

#include "workers.cuh"

namespace fusedrnn::cuda {

template <class T>
FUSEDRNN_DEVICE T value_or_zero(const T* p, int64_t at) {
  return p ? p[at] : T(0);
}

// ---- forward ------------------------------------------------------------------------------------

template <class Cell, class Sharing>
struct RecurrentForwardKernel : Sharing {
  using S = typename Sharing::S;
  using Worker = typename Sharing::Worker;
  using Pair = typename Tile<Sharing>::Pair;
  static constexpr int kKept = 2;  ///< state and h
  RecurrentForward<S> run;

  /// Rows: the gates of 16 units; depth: all units.
  struct Weight {
    static constexpr bool kDepthFirst = true;
    int first_unit, first_depth, first_of_depth;
    const S* weight_hh;
    int H;
    FUSEDRNN_DEVICE S at(int row, int depth) const {
      const int unit = first_unit + row % 16, k = first_of_depth + first_depth + depth;
      return unit < H && k < H ? weight_hh[(row / 16 * H + unit) * H + k] : S{};
    }
  };

  /// What a step needs besides the product.
  struct Inputs {
    bool is_active;
    int64_t position;
    float x[Cell::kGates];
  };

  FUSEDRNN_DEVICE Inputs load(const Worker& w, const Pair& p, int t) const {
    Inputs in;
    in.is_active = p.exists && w.is_active(p.row, t);
    if (!in.is_active) return in;
    const int H = run.hidden_size;
    in.position = w.position(t) + p.row;
    const float* x = run.direction[w.direction].x_product + in.position * Cell::kGates * H + p.unit;
    unroll<Cell::kGates>([&](auto g) { in.x[g] = x[g * H]; });
    return in;
  }

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const int H = run.hidden_size;
    const auto& of = run.direction[blockIdx.z];
    Worker w(run, of.exchange, memory, kKept);

    typename Sharing::Product product;
    w.template load<Weight>(product, of.weight_hh, H);
    float bias[Cell::kPreacts] = {};
    const int own_unit = w.pair(0, 0).unit;
    if (of.bias_ih && own_unit < H) {
      unroll<Cell::kGates>([&](auto g) {
        constexpr int in = Cell::input_preact[g], hidden = Cell::hidden_preact[g];
        bias[in] += value_of(of.bias_ih[g * H + own_unit]);
        bias[hidden] += value_of(of.bias_hh[g * H + own_unit]);
      });
    }
    for (int chunk = 0; chunk < w.chunks(); ++chunk) {
      for (int i = 0; i < Sharing::kPairs; ++i) {
        const Pair p = w.pair(chunk, i);
        if (!p.exists) continue;
        const float h = value_or_zero(of.h0, p.row * run.h0_stride + p.unit);
        w.kept(p, 0) =
            !Cell::kHasCellState ? h : value_or_zero(of.c0, p.row * run.c0_stride + p.unit);
        w.kept(p, 1) = h;
      }
      unroll<Sharing::kPairs>([&](auto i) {
        const Pair p = w.pair(chunk, i);
        const float h[1] = {p.exists ? w.kept(p, 1) : 0.f};
        w.set(0, chunk, p, h);
      });
    }
    w.pass(product, 0, w.chunks() - 1);

    for (int i = 0; i < run.steps; ++i) {
      const int t = w.time(i);
      for (int chunk = 0; chunk < w.chunks(); ++chunk) {
        // Asked for before the wait for the others.
        Inputs in[Sharing::kPairs];
        unroll<Sharing::kPairs>([&](auto n) { in[n] = load(w, w.pair(chunk, n), t); });
        w.collect(product, i, chunk);
        Outputs out[Sharing::kPairs];
        unroll<Sharing::kPairs>([&](auto n) {
          const Pair p = w.pair(chunk, n);
          float h[1] = {0};
          if (in[n].is_active) {
            apply(w, p, in[n], bias, out[n]);
            h[0] = out[n].h;
          } else if (p.exists) {
            h[0] = w.kept(p, 1);
          }
          w.set(i + 1, chunk, p, h);
        });
        w.pass(product, i + 1, chunk);
        // After what the others wait for.
        unroll<Sharing::kPairs>([&](auto n) {
          if (in[n].is_active) store(w, in[n].position, w.pair(chunk, n).unit, out[n]);
        });
      }
    }

    for (int chunk = 0; chunk < w.chunks(); ++chunk) {
      for (int i = 0; i < Sharing::kPairs; ++i) {
        const Pair p = w.pair(chunk, i);
        if (!p.exists) continue;
        round_to(of.h_n[p.row * H + p.unit], w.kept(p, 1));
        if (of.c_n) of.c_n[p.row * H + p.unit] = w.kept(p, 0);
      }
    }
  }

  struct Outputs {
    float h, saved[Cell::kSaved];
  };

  FUSEDRNN_DEVICE void apply(const Worker& w, const Pair& p, const Inputs& in,
                             const float (&bias)[Cell::kPreacts], Outputs& out) const {
    float sum[Cell::kPreacts];
    unroll<Cell::kPreacts>([&](auto k) { sum[k] = bias[k]; });
    unroll<Cell::kGates>([&](auto g) {
      constexpr int input = Cell::input_preact[g], hidden = Cell::hidden_preact[g];
      sum[input] += in.x[g];
      sum[hidden] += w.sum(p, g);
    });
    w.kept(p, 1) = out.h = Cell::forward(sum, w.kept(p, 0), out.saved);
  }

  FUSEDRNN_DEVICE void store(const Worker& w, int64_t position, int unit,
                             const Outputs& out) const {
    const auto& of = run.direction[w.direction];
    round_to(of.y[position * run.y_stride + unit], out.h);
    if (!of.saved) return;
    float* const saved = of.saved + position * Cell::kSaved * run.hidden_size + unit;
    unroll<Cell::kSaved>([&](auto a) { saved[a * run.hidden_size] = out.saved[a]; });
  }
};

// ---- backward -----------------------------------------------------------------------------------

template <class Cell, class Sharing>
struct RecurrentBackwardKernel : Sharing {
  using S = typename Sharing::S;
  using Worker = typename Sharing::Worker;
  using Pair = typename Tile<Sharing>::Pair;
  static constexpr int kKept = 2;  ///< dstate, and what a row that takes no part keeps of dh
  static constexpr int kGateDepth = Sharing::kDepth / Cell::kGates;  ///< of the depth, a gate's
  RecurrentBackward<S> run;

  /// Rows: units; depth: the gates of all units, or of the CTA's own.
  struct Weight {
    static constexpr bool kDepthFirst = false;
    int first_unit, first_depth, first_of_depth;
    const S* weight_hh;
    int H;
    FUSEDRNN_DEVICE S at(int row, int depth) const {
      const int unit = first_unit + row, gate = (first_depth + depth) / kGateDepth;
      const int k = first_of_depth + (first_depth + depth) % kGateDepth;
      return unit < H && k < H ? weight_hh[(gate * H + k) * H + unit] : S{};
    }
  };

  struct Inputs {
    bool is_active, has_before;  ///< of the row: it has a step before this one
    int64_t position;
    float dy, saved[Cell::kSaved];
    float before[Cell::kSaved];  ///< of the step before
    float h0, state;             ///< where there is none: the first h, and the state before this
  };

  FUSEDRNN_DEVICE Inputs load(const Worker& w, const Pair& p, int i) const {
    const auto& of = run.direction[w.direction];
    const int H = run.hidden_size, t = w.time(i);
    Inputs in;
    in.is_active = p.exists && w.is_active(p.row, t);
    if (!in.is_active) return in;
    in.position = w.position(t) + p.row;
    const auto load_saved = [&](float (&to)[Cell::kSaved], int64_t position) {
      unroll<Cell::kSaved>(
          [&](auto a) { to[a] = of.saved[(position * Cell::kSaved + a) * H + p.unit]; });
    };
    const int before = w.time(i - 1);
    in.has_before = w.is_active(p.row, before);
    if (in.has_before) {
      load_saved(in.before, w.position(before) + p.row);
      in.state = in.before[Cell::kSavedState];
    } else {
      in.h0 = value_or_zero(of.h0, p.row * run.h0_stride + p.unit);
      in.state =
          !Cell::kHasCellState ? in.h0 : value_or_zero(of.c0, p.row * run.c0_stride + p.unit);
    }
    in.dy = value_or_zero(of.dy, in.position * run.dy_stride + p.unit);
    load_saved(in.saved, in.position);
    return in;
  }

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const int H = run.hidden_size;
    const auto& of = run.direction[blockIdx.z];
    Worker w(run, of.exchange, memory, kKept);

    typename Sharing::Product product;
    w.template load<Weight>(product, of.weight_hh, H);
    for (int chunk = 0; chunk < w.chunks(); ++chunk) {
      for (int i = 0; i < Sharing::kPairs; ++i) {
        const Pair p = w.pair(chunk, i);
        if (!p.exists) continue;
        w.kept(p, 0) = value_or_zero(of.dc_n, p.row * H + p.unit);
        w.kept(p, 1) = value_or_zero(of.dh_n, p.row * H + p.unit);
      }
    }

    // Back from the last step; after the first there is one more product, for the gradient of h0.
    for (int n = 0; n <= run.steps; ++n) {
      const int i = run.steps - 1 - n;
      for (int chunk = 0; chunk < w.chunks(); ++chunk) {
        Inputs in[Sharing::kPairs];
        unroll<Sharing::kPairs>([&](auto m) { in[m] = load(w, w.pair(chunk, m), i); });
        if (n > 0) w.collect(product, n - 1, chunk);
        float dgate[Sharing::kPairs][Cell::kPreacts] = {};
        unroll<Sharing::kPairs>([&](auto m) {
          const Pair p = w.pair(chunk, m);
          if (n > 0 && p.exists) w.kept(p, 1) += w.sum(p, 0);
          if (in[m].is_active) apply(w, p, in[m], dgate[m]);
          float fed[Cell::kGates];
          unroll<Cell::kGates>([&](auto g) {
            constexpr int hidden = Cell::hidden_preact[g];
            fed[g] = dgate[m][hidden];
          });
          if (i >= 0) w.set(n, chunk, p, fed);
        });
        w.pass(product, n, chunk);
        // After what the others wait for.
        unroll<Sharing::kPairs>([&](auto m) {
          if (in[m].is_active) store(w, in[m], w.pair(chunk, m).unit, dgate[m]);
        });
      }
    }

    for (int chunk = 0; chunk < w.chunks(); ++chunk) {
      for (int i = 0; i < Sharing::kPairs; ++i) {
        const Pair p = w.pair(chunk, i);
        if (!p.exists) continue;
        const float dstate = w.kept(p, 0), dh = w.kept(p, 1);
        of.dh0[p.row * H + p.unit] = !Cell::kHasCellState ? dh + dstate : dh;
        if (of.dc0) of.dc0[p.row * H + p.unit] = dstate;
      }
    }
  }

  FUSEDRNN_DEVICE void apply(const Worker& w, const Pair& p, const Inputs& in,
                             float (&dgate)[Cell::kPreacts]) const {
    const float dh = w.kept(p, 1) + in.dy;
    w.kept(p, 1) = 0;
    Cell::backward(in.saved, in.state, dh, w.kept(p, 0), dgate);
  }

  FUSEDRNN_DEVICE void store(const Worker& w, const Inputs& in, int unit,
                             const float (&dgate)[Cell::kPreacts]) const {
    const auto& of = run.direction[w.direction];
    const float h = in.has_before ? Cell::output(in.before) : in.h0;
    round_to(of.h_previous[in.position * run.hidden_size + unit], h);
    S* const dgates = of.dgates + in.position * Cell::kPreacts * run.hidden_size + unit;
    unroll<Cell::kPreacts>([&](auto k) { round_to(dgates[k * run.hidden_size], dgate[k]); });
  }
};

// ---- launching ----------------------------------------------------------------------------------

/// Blocks, splits and a warp's depth in units of a variant (Cut), for operands of so many bytes:
/// the weights of a thread fill 128 registers, or half of them.
struct Variant {
  int blocks, splits, depth;
  constexpr int units() const { return splits * depth; }
};
constexpr Variant variant_of(Reach reach, bool half, int64_t operand_bytes) {
  const int most = operand_bytes == 2 ? 128 : 64;
  if (reach == Reach::cta) return {most / 16, 1, most};
  const int splits = reach == Reach::grid ? 8 : 4;
  return {8 / splits, splits, half ? most / 2 : most};
}

template <class T>
struct Type {
  using type = T;
};

/// Calls call(Type<the kernel>{}) for the cut and the precision; -1 where there is none.
template <class Cell, class S, bool kBackward, class Call>
int with_kernel(const Cut& cut, Precision precision, const Call& call) {
  const auto with_sharing = [&](auto sharing) {
    using Sharing = typename decltype(sharing)::type;
    if constexpr (kBackward) {
      return call(Type<RecurrentBackwardKernel<Cell, Sharing>>{});
    } else {
      return call(Type<RecurrentForwardKernel<Cell, Sharing>>{});
    }
  };
  const auto with = [&](auto reach, auto half, auto tensor) {
    constexpr Variant v = variant_of(reach, half, sizeof(S));
    if constexpr (reach == Reach::cluster && kBackward) {
      constexpr int tiles = v.units() / (8 * 16), depth = Cell::kGates * kWarp;
      return with_sharing(Type<ClusterScattering<TensorProduct<S, tiles, depth>>>{});
    } else {
      constexpr int tiles = kBackward ? 1 : Cell::kGates;
      constexpr int depth = kBackward ? v.depth * Cell::kGates : v.depth;
      using Tensor = TensorProduct<S, tiles, depth>;
      using Product = std::conditional_t<tensor, Tensor, PlainProduct<tiles, depth>>;
      if constexpr (reach == Reach::cta) {
        return with_sharing(Type<AloneSharing<Product, v.blocks>>{});
      } else if constexpr (reach == Reach::cluster) {
        return with_sharing(Type<ClusterSharing<Product, v.splits>>{});
      } else {
        return with_sharing(Type<GridSharing<Product, v.splits>>{});
      }
    }
  };
  const auto of_variant = [&](auto tensor) {
    using std::integral_constant;
    constexpr integral_constant<Reach, Reach::grid> grid;
    constexpr integral_constant<Reach, Reach::cluster> cluster;
    if (cut.reach == Reach::cta) {
      return with(integral_constant<Reach, Reach::cta>{}, std::false_type{}, tensor);
    }
    if (cut.reach == Reach::grid) {
      return cut.half ? with(grid, std::true_type{}, tensor)
                      : with(grid, std::false_type{}, tensor);
    }
    if constexpr (!tensor) {
      return -1;
    } else {
      return cut.half ? with(cluster, std::true_type{}, tensor)
                      : with(cluster, std::false_type{}, tensor);
    }
  };
  if constexpr (sizeof(S) == 4) {
    if (precision == Precision::ieee) return of_variant(std::false_type{});
  }
  return of_variant(std::true_type{});
}

template <class Kernel>
Grid grid_of(const Cut& cut, int directions) {
  return {unsigned(cut.ctas),       unsigned(cut.groups),
          unsigned(directions),     Kernel::shared_bytes(cut, Kernel::kKept),
          cut.reach == Reach::grid, cut.reach == Reach::cluster ? unsigned(cut.ctas) : 0};
}

template <class Cell, bool kBackward, class S, class Run>
int launch_recurrent(const Run& run, const Cut& cut, Precision precision, void* stream) {
  return with_kernel<Cell, S, kBackward>(cut, precision, [&](auto type) {
    using Kernel = typename decltype(type)::type;
    Kernel kernel;
    kernel.run = run;
    return launch(kernel, grid_of<Kernel>(cut, run.directions), stream);
  });
}

template <class Cell, class S>
int recurrent_forward(const RecurrentForward<S>& run, const Cut& cut, Precision precision,
                      void* stream) {
  return launch_recurrent<Cell, false, S>(run, cut, precision, stream);
}
template <class Cell, class S>
int recurrent_backward(const RecurrentBackward<S>& run, const Cut& cut, Precision precision,
                       void* stream) {
  return launch_recurrent<Cell, true, S>(run, cut, precision, stream);
}
template <class Cell, class S>
int recurrent_clusters(const Cut& cut, bool backward, Precision precision) {
  const auto count = [&](auto type) {
    using Kernel = typename decltype(type)::type;
    return active_clusters<Kernel>(grid_of<Kernel>(cut, 1));
  };
  const int found = backward ? with_kernel<Cell, S, true>(cut, precision, count)
                             : with_kernel<Cell, S, false>(cut, precision, count);
  return found > 0 ? found : 0;
}

#define FUSEDRNN_RECURRENT_OF(Cell, S)                                                         \
  template int recurrent_forward<Cell, S>(const RecurrentForward<S>&, const Cut&, Precision,   \
                                          void*);                                              \
  template int recurrent_backward<Cell, S>(const RecurrentBackward<S>&, const Cut&, Precision, \
                                           void*);                                             \
  template int recurrent_clusters<Cell, S>(const Cut&, bool, Precision);

}  // namespace fusedrnn::cuda
