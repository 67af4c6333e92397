// How the threads of a launch share a layer, and how steps hand on what the next one's products
// read: h, or the gradients of the sums that weight_hh feeds.
//
// A *sharing* has the sizes; its Worker is a thread's view. Both workers have
//
//   load(product, ...)           reads the weights that this thread keeps
//   set(k, chunk, pair, values)  what the k-th products read of a pair
//   pass(product, k, chunk)      all of a chunk is set, and the sums before it have been read
//   collect(product, k, chunk)   waits for the k-th; then sum() has the products
//
// each by all threads. Products are counted from 0 to the number of steps - 1; what is set and
// passed after those, nobody reads. What is handed on has two halves, for even k and odd: who
// writes one has seen all others done with what was there.
#pragma once

#include "products.cuh"

namespace fusedrnn::cuda {

/// The rows and units of a CTA, and of its threads. Sharing: kThreads, kUnits of a CTA, kRows of a
/// chunk, which is what a product takes of the batch.
template <class Sharing>
class Tile {
 public:
  FUSEDRNN_DEVICE Tile(const Recurrence& run, float* kept)
      : run_(run),
        direction(blockIdx.z),
        first_row(blockIdx.y * run.tile_rows),
        first_unit(blockIdx.x * Sharing::kUnits),
        kept_(kept) {}

  /// What a thread has to do of `chunk`: its p-th pair of a row of the batch and a unit.
  struct Pair {
    int row_of_chunk;
    int row_of_tile, row;  ///< row: of the batch
    int unit;              ///< always the same for a thread
    bool exists;
  };
  FUSEDRNN_DEVICE Pair pair(int chunk, int p) const {
    Pair pair;
    pair.row_of_chunk = (threadIdx.x + p * Sharing::kThreads) / Sharing::kUnits;
    pair.row_of_tile = chunk * Sharing::kRows + pair.row_of_chunk;
    pair.row = first_row + pair.row_of_tile;
    pair.unit = first_unit + threadIdx.x % Sharing::kUnits;
    pair.exists = pair.row < run_.rows && pair.unit < run_.hidden_size;
    return pair;
  }
  /// Those that have rows of the batch.
  FUSEDRNN_DEVICE int chunks() const {
    const int rows = run_.rows - first_row;
    return ((rows < run_.tile_rows ? rows : run_.tile_rows) + Sharing::kRows - 1) / Sharing::kRows;
  }
  FUSEDRNN_DEVICE int rows_of(int chunk) const {
    const int rows = run_.rows - first_row - chunk * Sharing::kRows;
    return rows < Sharing::kRows ? rows : Sharing::kRows;
  }

  /// The i-th value that the CTA keeps for a pair from step to step.
  FUSEDRNN_DEVICE float& kept(const Pair& p, int i) const {
    return kept_[(i * run_.tile_rows + p.row_of_tile) * Sharing::kUnits +
                 threadIdx.x % Sharing::kUnits];
  }

  /// The time of the i-th step of this direction.
  FUSEDRNN_DEVICE int time(int i) const { return direction ? run_.steps - 1 - i : i; }
  FUSEDRNN_DEVICE int64_t position(int t) const {
    return run_.position ? run_.position[t] : int64_t(t) * run_.rows;
  }
  FUSEDRNN_DEVICE bool is_active(int row, int t) const {
    if (t < 0 || t >= run_.steps) return false;
    if (run_.lengths) return t < run_.lengths[row];
    return !run_.position || row < run_.position[t + 1] - run_.position[t];
  }

 protected:
  const Recurrence& run_;

 public:
  const int direction, first_row, first_unit;

 protected:
  float* kept_;
};

/// What has come from the other CTAs of a cluster: a mailbox for each chunk and half.
class Mail {
 public:
  /// All threads: after this, mail can come. bytes(chunk): of all CTAs.
  template <class Bytes>
  FUSEDRNN_DEVICE void start(Mailbox* boxes, int chunks, int steps, const Bytes& bytes) {
    boxes_ = boxes;
    chunks_ = chunks;
    steps_ = steps;
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2 * chunks; ++i) {
        open(boxes + i);
        expect(boxes + i, bytes(i % chunks));
      }
    }
    sync_cluster();
  }
  FUSEDRNN_DEVICE Mailbox* box(int k, int chunk) const { return boxes_ + k % 2 * chunks_ + chunk; }
  /// Until all of the k-th step's has come. What then comes into the same box is of step k + 2,
  /// from CTAs that have had this one's mail of step k + 1.
  FUSEDRNN_DEVICE void wait(int k, int chunk, uint32_t bytes) const {
    wait_for(box(k, chunk), k / 2 % 2);
    if (threadIdx.x == 0 && k + 2 < steps_) expect(box(k, chunk), bytes);
  }

 private:
  Mailbox* boxes_;
  int chunks_, steps_;
};

/// Elements between rows of operands in shared memory, of so many each: with a multiple of 128
/// bytes and 64 more, the 16 bytes that lanes of a product read together are in different banks.
template <class S>
constexpr int operand_stride(int depth) {
  const int bytes = depth * int(sizeof(S)), over = bytes % 128;
  return (bytes + (over <= 64 ? 64 - over : 192 - over)) / int(sizeof(S));
}

// ---- every CTA has all that its products read ---------------------------------------------------

template <class Sharing>
class GatheringWorker;

/// A CTA has kBlocks blocks of 16 units, and kSplits warps for each, which share the depth of its
/// product. Forward, the rows of its matrix are the gates of the block's units, kTiles = G, and the
/// depth is all units' h; backward, the rows are the units and the depth all units' gradients. The
/// sums of the splits meet in shared memory, where each thread takes those of one unit and row, in
/// a fixed order, and applies the cell.
template <class Product_, int kBlocks_, int kSplits_, Reach kReach_>
struct Gathering {
  using Product = Product_;
  using S = typename Product::S;
  static constexpr Reach kReach = kReach_;
  static constexpr int kBlocks = kBlocks_, kSplits = kSplits_;
  static constexpr int kBlockUnits = 16;
  static constexpr int kThreads = kWarp * kBlocks * kSplits;
  static constexpr int kUnits = kBlockUnits * kBlocks;
  static constexpr int kDepth = kSplits * Product::kDepth;
  static constexpr int kTileRows = 16 * Product::kTiles;
  /// Between the sums of blocks, and of rows: threads that store a product's sums, or read those of
  /// two blocks, use all banks.
  static constexpr int kBlockStride =
      kTileRows % 32 == 0 && kBlocks > 1 ? kTileRows + 16 : kTileRows;
  static constexpr int kStride = kBlocks * kBlockStride + 4;
  /// Batch rows of a product. Fewer where more CTAs or clusters find room: each is done sooner.
  static constexpr int kRows = kReach == Reach::grid ? 16 : 8;
  static constexpr int kPairs = kRows * kUnits / kThreads;  ///< (unit, row) of a thread at a time
  static_assert(kRows * kUnits % kThreads == 0 && kThreads % kUnits == 0);
  static constexpr bool kShared = kReach != Reach::grid;  ///< that is where operands are
  static constexpr int kExchangeStride = kShared ? operand_stride<S>(kDepth) : kDepth;

  // Shared memory, in floats: the sums, before them the weights on their way, scratch of the warps,
  // `kept` floats for each (row, unit), and the exchange where it is there, with its mailboxes.
  static constexpr int kOfLoading = kBlocks * kSplits * Product::kLoadScratch / int(sizeof(float));
  static constexpr int kOfProducts = kSplits * kRows * kStride;
  static constexpr int kPartials = kOfProducts > kOfLoading ? kOfProducts : kOfLoading;
  static constexpr int kScratch = kBlocks * kSplits * Product::kScratch;
  static size_t shared_bytes(const Cut& cut, int kept) {
    return sizeof(float) * size_t(kPartials + kScratch + kept * cut.tile_rows * kUnits) +
           (kShared ? 2 * cut.tile_rows * kExchangeStride * sizeof(S) : 0) +
           (kReach == Reach::cluster ? 2 * cut.tile_rows / kRows * sizeof(Mailbox) : 0);
  }
};
template <class Product, int kBlocks>
struct AloneSharing : Gathering<Product, kBlocks, 1, Reach::cta> {
  using Worker = GatheringWorker<AloneSharing>;
};
template <class Product, int kSplits>
struct GridSharing : Gathering<Product, 1, kSplits, Reach::grid> {
  using Worker = GatheringWorker<GridSharing>;
};
/// A warp's lanes have 32 units of one row, which it sends together.
template <class Product, int kSplits>
struct ClusterSharing : Gathering<Product, 2, kSplits, Reach::cluster>, UsesClusters {
  using Worker = GatheringWorker<ClusterSharing>;
};

template <class Sharing>
class GatheringWorker : public Tile<Sharing> {
 public:
  using S = typename Sharing::S;
  using Product = typename Sharing::Product;
  using typename Tile<Sharing>::Pair;
  static constexpr Reach kReach = Sharing::kReach;

  FUSEDRNN_DEVICE GatheringWorker(const Recurrence& run, S* exchange, unsigned char* memory,
                                  int kept)
      : Tile<Sharing>(run, reinterpret_cast<float*>(memory) + Sharing::kPartials + Sharing::kScratch),
        sums_(reinterpret_cast<float*>(memory)),
        arrivals_(run.arrivals + this->direction * gridDim.y + blockIdx.y) {
    if constexpr (Sharing::kShared) {
      exchange_ = reinterpret_cast<S*>(this->kept_ + kept * run.tile_rows * Sharing::kUnits);
      half_ = run.tile_rows * Sharing::kExchangeStride;
      for (int i = threadIdx.x; i < 2 * half_; i += Sharing::kThreads) exchange_[i] = S{};
    } else {
      exchange_ = exchange + this->first_row * Sharing::kExchangeStride;
      half_ = gridDim.y * run.tile_rows * Sharing::kExchangeStride;
    }
    if constexpr (kReach == Reach::cta) sync_cta();
    if constexpr (kReach == Reach::cluster) {
      mail_.start(reinterpret_cast<Mailbox*>(exchange_ + 2 * half_), this->chunks(), run.steps,
                  [&](int chunk) { return bytes(chunk); });
    }
  }

  /// Weight is made of (first unit, first depth) of the warp's part and `args`.
  template <class Weight, class... Args>
  FUSEDRNN_DEVICE void load(Product& product, const Args&... args) const {
    const int warp = threadIdx.x / kWarp;
    const Weight weight{this->first_unit + warp / Sharing::kSplits * Sharing::kBlockUnits,
                        warp % Sharing::kSplits * Product::kDepth, 0, args...};
    product.load(weight, reinterpret_cast<unsigned char*>(sums_) + warp * Product::kLoadScratch);
    sync_cta();  // that was the memory of the sums
  }

  /// values[i] is of the i-th of kParts equal parts of the depth.
  template <int kParts>
  FUSEDRNN_DEVICE void set(int k, int chunk, const Pair& p, const float (&values)[kParts]) const {
    if (k == this->run_.steps) return;
    S* const row =
        exchange_ + k % 2 * half_ + p.row_of_tile * Sharing::kExchangeStride + this->first_unit;
    if constexpr (kReach == Reach::cluster) {
      static_assert(kParts == 1 && Sharing::kUnits == kWarp);
      if (p.row >= this->run_.rows) return;
      S own;
      Product::set_operand(own, p.exists ? values[0] : 0.f);
      send_to_all(own, row, mail_.box(k, chunk));
    } else if (p.exists) {
      unroll<kParts>([&](auto part) {
        Product::set_operand(row[part * (Sharing::kDepth / kParts) + threadIdx.x % Sharing::kUnits],
                             values[part]);
      });
    }
  }

  FUSEDRNN_DEVICE void pass(const Product&, int k, int chunk) const {
    const bool last = chunk + 1 == this->chunks();
    if constexpr (kReach == Reach::cluster) {
      // The mail of a chunk tells that those who sent it have read its sums, not those of another.
      if (this->chunks() > 1) sync_cta();
    } else if (!last || k < this->run_.steps) {
      sync_cta();
    }
    if (kReach == Reach::grid && last && threadIdx.x == 0) add_release(arrivals_, 1);
  }

  FUSEDRNN_DEVICE void collect(const Product& product, int k, int chunk) const {
    if constexpr (kReach == Reach::cluster) mail_.wait(k, chunk, bytes(chunk));
    if constexpr (kReach == Reach::grid) {
      if (chunk == 0) {
        if (threadIdx.x == 0) {
          while (load_acquire(arrivals_) < uint32_t(k + 1) * gridDim.x) pause();
        }
        sync_cta();
      }
    }
    const int warp = threadIdx.x / kWarp, block = warp / Sharing::kSplits;
    const int split = warp % Sharing::kSplits;
    const Operands<S, Sharing::kShared> h{exchange_ + k % 2 * half_ +
                                              chunk * Sharing::kRows * Sharing::kExchangeStride +
                                              split * Product::kDepth,
                                          Sharing::kExchangeStride};
    product.template multiply<Sharing::kRows>(
        h, sums_ + split * Sharing::kRows * Sharing::kStride + block * Sharing::kBlockStride,
        Sharing::kStride, sums_ + Sharing::kPartials + warp * Product::kScratch);
    sync_cta();
  }

  /// Of the chunk that was collected last; `tile`: of the kTiles of the product.
  FUSEDRNN_DEVICE float sum(const Pair& p, int tile) const {
    const int unit = threadIdx.x % Sharing::kUnits, block = unit / Sharing::kBlockUnits;
    const float* at = sums_ + p.row_of_chunk * Sharing::kStride + block * Sharing::kBlockStride +
                      tile * 16 + unit % Sharing::kBlockUnits;
    float sum = at[0];
#pragma unroll
    for (int split = 1; split < Sharing::kSplits; ++split) {
      sum += at[split * Sharing::kRows * Sharing::kStride];
    }
    return sum;
  }

 private:
  /// Of mail for a chunk.
  FUSEDRNN_DEVICE uint32_t bytes(int chunk) const {
    return gridDim.x * Sharing::kUnits * this->rows_of(chunk) * sizeof(S);
  }
  /// Every lane's operand to the same place in each CTA of the cluster, 16 bytes at a time: a lane
  /// has one of the words of the row, and sends it to some of the CTAs.
  static FUSEDRNN_DEVICE void send_to_all(S own, S* row, Mailbox* box) {
    constexpr int kPerWord = 4 / sizeof(S), kOf = 16 / sizeof(S), kWords = kWarp / kOf;
    const int lane = threadIdx.x % kWarp;
    uint32_t bits;
    if constexpr (kPerWord == 2) {
      bits = own.bits;
      bits |= shuffle(bits, lane ^ 1) << 16;  // of use in even lanes
    } else {
      bits = scalar::bit_cast<uint32_t>(own);
    }
    Words words;
    unroll<4>([&](auto i) { words.word[i] = shuffle(bits, lane % kWords * kOf + i * kPerWord); });
    sync_warp();  // whoever gets this mail may write what any lane has read
    for (unsigned cta = lane / kWords; cta < gridDim.x; cta += kWarp / kWords) {
      send(words, row + lane % kWords * kOf, box, cta);
    }
  }

  float* sums_;
  S* exchange_;
  int half_;  ///< elements of a half of the exchange
  uint32_t* arrivals_;
  Mail mail_;  ///< of a cluster
};

// ---- every CTA's products are of its own units alone --------------------------------------------

template <class Sharing>
class ScatteringWorker;

/// Backward in a cluster: a CTA multiplies its own 32 units' gradients, the depth, with the weights
/// to all units, the rows, which its 8 warps share; and sends each CTA the products that go into
/// the gradients of its units, to be summed there in a fixed order. That is less to send than the
/// gradients, G values a unit, to everybody, and no warp waits for another's part of a product.
template <class Product_>
struct ClusterScattering : UsesClusters {
  using Product = Product_;
  using S = typename Product::S;
  using Worker = ScatteringWorker<ClusterScattering>;
  static constexpr int kThreads = 256, kUnits = kWarp, kRows = 8, kPairs = 1;
  static_assert(kRows * kUnits == kThreads * kPairs);
  static constexpr int kDepth = Product::kDepth;                ///< G * kUnits
  static constexpr int kTileUnits = 16;                         ///< of a tile of the product
  static constexpr int kOfWarp = kTileUnits * Product::kTiles;  ///< units
  static constexpr int kOperandStride = operand_stride<S>(kDepth);
  static constexpr int kMostCtas = kOfWarp * (kThreads / kWarp) / kUnits;
  static constexpr int kOfCta =
      kUnits * kRows;  ///< products that a CTA sends to another for a chunk

  // Shared memory: the weights on their way, `kept` floats for each (row, unit), operands and what
  // comes, both in two halves, and mailboxes.
  static constexpr int kOfLoading = kThreads / kWarp * Product::kLoadScratch;
  static size_t shared_bytes(const Cut& cut, int kept) {
    return kOfLoading + sizeof(float) * kept * cut.tile_rows * kUnits +
           2 * cut.tile_rows * kOperandStride * sizeof(S) +
           2 * cut.tile_rows / kRows * (cut.ctas * kOfCta * sizeof(float) + sizeof(Mailbox));
  }
};

template <class Sharing>
class ScatteringWorker : public Tile<Sharing> {
 public:
  using S = typename Sharing::S;
  using Product = typename Sharing::Product;
  using typename Tile<Sharing>::Pair;

  FUSEDRNN_DEVICE ScatteringWorker(const Recurrence& run, S*, unsigned char* memory, int kept)
      : Tile<Sharing>(run, reinterpret_cast<float*>(memory + Sharing::kOfLoading)),
        loading_(memory) {
    operands_ = reinterpret_cast<S*>(this->kept_ + kept * run.tile_rows * Sharing::kUnits);
    const int operands = 2 * run.tile_rows * Sharing::kOperandStride;
    for (int i = threadIdx.x; i < operands; i += Sharing::kThreads) operands_[i] = S{};
    come_ = reinterpret_cast<float*>(operands_ + operands);
    mail_.start(
        reinterpret_cast<Mailbox*>(come_ + 2 * this->chunks() * gridDim.x * Sharing::kOfCta),
        this->chunks(), run.steps, [&](int chunk) { return bytes(chunk); });
  }

  /// Weight is made of (first unit of the warp's rows, 0, first unit of the depth) and `args`.
  template <class Weight, class... Args>
  FUSEDRNN_DEVICE void load(Product& product, const Args&... args) const {
    const int warp = threadIdx.x / kWarp;
    const Weight weight{warp * Sharing::kOfWarp, 0, this->first_unit, args...};
    product.load(weight, loading_ + warp * Product::kLoadScratch);
  }

  template <int kParts>
  FUSEDRNN_DEVICE void set(int k, int, const Pair& p, const float (&values)[kParts]) const {
    static_assert(kParts * Sharing::kUnits == Sharing::kDepth);
    if (!p.exists) return;
    S* const row = operands(k, p.row_of_tile);
    unroll<kParts>([&](auto part) {
      Product::set_operand(row[part * Sharing::kUnits + threadIdx.x % Sharing::kUnits],
                           values[part]);
    });
  }

  /// The products of this CTA's operands, each sent to the CTA that has its unit.
  FUSEDRNN_DEVICE void pass(const Product& product, int k, int chunk) const {
    if (k == this->run_.steps) return;
    sync_cta();
    float c[1][Product::kTiles][4] = {};
    product.sums(Operands<S, true>{operands(k, chunk * Sharing::kRows), Sharing::kOperandStride},
                 c);
    const int lane = threadIdx.x % kWarp, r = lane / 4, q = lane % 4;
    float* const to = come(k, chunk) + blockIdx.x * Sharing::kOfCta;
    unroll<Product::kTiles>([&](auto m) {
      const int first = threadIdx.x / kWarp * Sharing::kOfWarp + m * Sharing::kTileUnits;
      const unsigned cta = first / Sharing::kUnits;
      if (cta >= gridDim.x || 2 * q >= this->rows_of(chunk)) return;
      const bool odd = swapped(first % Sharing::kUnits);
      unroll<2>([&](auto i) {
        const int unit = first % Sharing::kUnits + r + 8 * i;
        const float even = c[0][m][2 * i], uneven = c[0][m][2 * i + 1];
        send(odd ? uneven : even, odd ? even : uneven, to + place(unit, q), mail_.box(k, chunk),
             cta);
      });
    });
  }

  FUSEDRNN_DEVICE void collect(const Product&, int k, int chunk) {
    mail_.wait(k, chunk, bytes(chunk));
    collected_ = come(k, chunk);
  }

  FUSEDRNN_DEVICE float sum(const Pair& p, int) const {
    const int unit = threadIdx.x % Sharing::kUnits;
    const float* at =
        collected_ + place(unit, p.row_of_chunk / 2) + (p.row_of_chunk % 2 ^ int(swapped(unit)));
    float of_cta[Sharing::kMostCtas], sum = 0;  // all asked for before the first is there
    unroll<Sharing::kMostCtas>(
        [&](auto cta) { of_cta[cta] = cta < gridDim.x ? at[cta * Sharing::kOfCta] : 0.f; });
    unroll<Sharing::kMostCtas>([&](auto cta) { sum += of_cta[cta]; });
    return sum;
  }

 private:
  /// Of mail for a chunk: rows come in twos.
  FUSEDRNN_DEVICE uint32_t bytes(int chunk) const {
    return gridDim.x * Sharing::kUnits * ((this->rows_of(chunk) + 1) / 2) * 2 * sizeof(float);
  }
  FUSEDRNN_DEVICE S* operands(int k, int row) const {
    return operands_ + (k % 2 * this->run_.tile_rows + row) * Sharing::kOperandStride;
  }
  /// What comes for a chunk: of each CTA the products of [kUnits, kRows].
  FUSEDRNN_DEVICE float* come(int k, int chunk) const {
    return come_ + (k % 2 * this->chunks() + chunk) * int(gridDim.x) * Sharing::kOfCta;
  }
  /// Where rows 2 pair and 2 pair + 1 of a unit are, and whether in that order: those that a warp
  /// reads of 32 units are in different banks.
  static FUSEDRNN_DEVICE int place(int unit, int pair) {
    return unit * Sharing::kRows + 2 * (pair ^ (unit / 4 % 4));
  }
  static FUSEDRNN_DEVICE bool swapped(int unit) { return unit / 16 % 2; }

  unsigned char* loading_;
  S* operands_;
  float *come_, *collected_ = nullptr;
  Mail mail_;
};

}  // namespace fusedrnn::cuda
