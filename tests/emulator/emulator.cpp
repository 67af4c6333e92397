// The emulator's scheduler: fibers, their waits, and deadlock reports.
//
// A wrong kernel fails here, though it might pass for months on a GPU:
//   - Schedules differ from launch to launch (see Order).
//   - Shared memory begins as NaN, ends at a page that can't be touched, and is unmapped with its
//   CTA.
//   - No more CTAs run together than a launch asks for.
//   - Stores to other CTAs arrive late and out of order.
//   - A launch that can't go on ends by reporting its waiting threads.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bitset>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "../../csrc/cuda/ptx.cuh"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

Index3 threadIdx, blockIdx, gridDim;

// ThreadSanitizer's interface; null in a program without it.
extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_destroy_fiber(void*);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
__attribute__((weak)) void __tsan_read8(void*);
__attribute__((weak)) void __tsan_write_range(void*, unsigned long);
__attribute__((weak)) void __tsan_ignore_thread_begin();
__attribute__((weak)) void __tsan_ignore_thread_end();
}

namespace fusedrnn::emulator {
namespace {

const bool has_tsan = __tsan_create_fiber != nullptr;
void acquire(void* p) {
  if (has_tsan) __tsan_acquire(p);
}
void release(void* p) {
  if (has_tsan) __tsan_release(p);
}

/// Hides the emulator's own memory from ThreadSanitizer, which sees calls of memcpy and free.
struct Hidden {
  Hidden() {
    if (has_tsan) __tsan_ignore_thread_begin();
  }
  ~Hidden() {
    if (has_tsan) __tsan_ignore_thread_end();
  }
};

// ---- switching ----------------------------------------------------------------------------------

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void fusedrnn_switch(void** save, void* to);
// Saves the callee-saved registers on the stack that it leaves.
asm(R"(
.text
.type fusedrnn_switch, @function
fusedrnn_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fusedrnn_switch, .-fusedrnn_switch
)");
void switch_context(Context& from, Context& to) {
  fusedrnn_switch(&from.stack_pointer, to.stack_pointer);
}
void make_context(Context& context, unsigned char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size) - 2;  // aligned as after a call
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;
  context.stack_pointer = std::fill_n(top - 6, 6, nullptr) - 6;
}
#else
struct Context {
  ucontext_t context;
};
void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
void make_context(Context& context, unsigned char* stack, size_t size, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = size;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
#endif

const size_t kPage = size_t(sysconf(_SC_PAGESIZE));

/// Memory between two pages that can't be touched. It ends at the second.
class Guarded {
 public:
  explicit Guarded(size_t size) : size_(size), pages_((size + kPage - 1) / kPage * kPage) {
    void* p = mmap(nullptr, pages_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) std::abort();
    base_ = static_cast<unsigned char*>(p);
    if (pages_ && mprotect(base_ + kPage, pages_, PROT_READ | PROT_WRITE)) std::abort();
  }
  ~Guarded() { munmap(base_, pages_ + 2 * kPage); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  unsigned char* data() const { return base_ + kPage + pages_ - size_; }
  size_t size() const { return size_; }

 private:
  size_t size_, pages_;
  unsigned char* base_;
};

constexpr size_t kStack = 256 * 1024;

// ---- a launch -----------------------------------------------------------------------------------

struct Cta;

enum class State { ready, polling, waiting, gone };

struct Fiber {
  Context context;
  Cta* cta = nullptr;
  unsigned thread = 0;
  State state = State::ready;
  Where where = {"start", 0};
  size_t place = 0;  ///< index in its state's list
  bool starved = false;
  void* tsan = nullptr;
  std::unique_ptr<Guarded> stack;
};

/// A barrier for a warp, a CTA or a cluster.
struct Barrier {
  unsigned size = 0, gone = 0;
  std::vector<Fiber*> waiting;

  void expect(unsigned threads) {
    size = threads;
    waiting.reserve(threads);  // ThreadSanitizer would count later growth as the kernel's
  }
};

struct Warp {
  Barrier barrier, exchange;
  unsigned round = 0;
  alignas(64) unsigned char slots[2][32 * 64];
};

/// CTAs that run together and write into each other's shared memory. Without clusters each CTA has
/// its own.
struct Cluster {
  Barrier barrier;
  std::vector<Cta*> ctas;  ///< null where one is gone
};

/// A transaction barrier. A phase completes when its bytes are announced and have all arrived.
struct TxBarrier {
  uint64_t phases = 0;     ///< completed
  bool announced = false;  ///< in this phase
  int64_t pending = 0;     ///< bytes to come; negative if some arrived before the announcement
  std::vector<Fiber*> waiting = {};
};

constexpr unsigned kMostThreads = 1024;
using ThreadSet = std::bitset<kMostThreads>;

/// A word stored by store_relaxed that has not arrived in memory yet.
struct RelaxedWord {
  uint32_t* to = nullptr;
  uint32_t word = 0;
  Cta* cta = nullptr;    ///< null if it has left the kernel
  bool is_held = false;  ///< it waits until nothing else can go on
  /// The CTA's threads that must see it: its writer, and those that met a thread that must see it
  /// at a barrier.
  ThreadSet known = {};
  size_t place = 0, place_in_cta = 0;  ///< in the lists of words
};
using WordList = std::vector<RelaxedWord*>;

constexpr int kNamedBarriers = 16;  ///< number 0 is sync_cta's

struct Cta {
  Index3 index;
  std::shared_ptr<Cluster> cluster;
  std::map<size_t, TxBarrier> tx_barriers;  ///< by offset in shared memory
  Barrier barrier;
  Barrier named[kNamedBarriers];
  std::vector<Warp> warps;
  std::vector<Fiber*> fibers;
  std::unique_ptr<Guarded> shared;
  WordList relaxed;  ///< the words of its threads that have not arrived
  unsigned gone = 0;
};

/// How the scheduler chooses among the threads that can go on.
enum class Order {
  random,        ///< any thread
  warps,         ///< a warp's lanes while one can go on, then any other warp
  in_turn,       ///< the one that has waited longest
  last_first,    ///< the one that became ready last
  starving_cta,  ///< random, except that one CTA's threads go on only if no others can
  starving_warp,
  kCount
};

/// An asynchronous store that has not arrived yet.
struct Message {
  Cta* to;
  size_t at, barrier;  ///< offsets in its shared memory
  unsigned char data[16];
  unsigned bytes;
};

/// When the words of store_relaxed arrive.
enum class Arrival {
  at_once,
  random,       ///< soon or late, in any order
  late,         ///< when nothing else can go on, a few or many at a time
  clears_late,  ///< the words of all ones after everything else, other words at random
  cta_late,     ///< the words of one CTA after everything else, other words at random
  kCount
};

/// The words that have not arrived yet.
class RelaxedWords {
 public:
  RelaxedWords() = default;
  RelaxedWords(const RelaxedWords&) = delete;
  ~RelaxedWords() {
    for (const WordList& list : lists_) {
      for (const RelaxedWord* w : list) delete w;
    }
  }
  bool empty() const { return lists_[0].empty() && lists_[1].empty(); }
  const WordList& list(bool is_held) const { return lists_[is_held]; }

  /// Earlier words for the same place that `thread` must see arrive now, or never.
  void add(RelaxedWord word, unsigned thread, bool arrives) {
    while (RelaxedWord* const earlier = find(word.to, word.cta, thread)) {
      if (arrives) *word.to = earlier->word;
      word.known |= earlier->known;
      remove(earlier);
    }
    word.known.set(thread);
    RelaxedWord* const w = new RelaxedWord(word);
    w->place = lists_[w->is_held].size();
    lists_[w->is_held].push_back(w);
    w->place_in_cta = w->cta->relaxed.size();
    w->cta->relaxed.push_back(w);
    by_address_[w->to].push_back(w);
  }
  void arrive(RelaxedWord* w) {
    *w->to = w->word;
    remove(w);
  }
  /// The words that a CTA's thread must see arrive; all words of the CTA if `thread` is negative.
  void arrive(Cta* cta, int thread) {
    for (size_t i = cta->relaxed.size(); i-- > 0;) {
      RelaxedWord* const w = cta->relaxed[i];
      if (thread < 0 || w->known[size_t(thread)]) arrive(w);
    }
  }
  /// The word that a thread must see at p; null: the word in memory.
  RelaxedWord* find(const uint32_t* p, const Cta* cta, unsigned thread) const {
    const auto found = by_address_.find(p);
    if (found == by_address_.end()) return nullptr;
    for (RelaxedWord* w : found->second) {
      if (w->cta == cta && w->known[thread]) return w;
    }
    return nullptr;
  }

 private:
  void remove(RelaxedWord* w) {
    WordList& list = lists_[w->is_held];
    (list[w->place] = list.back())->place = w->place;
    list.pop_back();
    if (w->cta) {
      WordList& of_cta = w->cta->relaxed;
      (of_cta[w->place_in_cta] = of_cta.back())->place_in_cta = w->place_in_cta;
      of_cta.pop_back();
    }
    WordList& same = by_address_[w->to];
    same.erase(std::find(same.begin(), same.end(), w));
    delete w;
  }

  WordList lists_[2];  ///< by is_held
  std::unordered_map<const uint32_t*, WordList> by_address_;
};

struct Launch {
  const cuda::Grid& grid;
  unsigned threads;
  const void* kernel;
  Thread* thread;
  std::string name = {};
  std::mt19937_64 random = {};
  Order order = Order::random;
  std::vector<Fiber*> ready = {}, starved = {}, polling = {};
  std::vector<std::unique_ptr<Cta>> ctas = {};
  Context main = {};
  void* main_tsan = nullptr;
  Fiber* current = nullptr;
  size_t alive = 0, idle_polls = 0, next_poll = 0;
  std::vector<Message> in_flight = {};
  bool late_stores = false;  ///< they arrive when nothing else can go on
  RelaxedWords relaxed = {};
  Arrival arrival = Arrival::at_once;
  unsigned late_cta = 0;
  bool is_large = false;     ///< so many CTAs that schedules must be shorter
  size_t hurry = 1;          ///< about so many turns pass until a word arrives
  bool clock_moves = false;  ///< since nothing could go on
  uint64_t clock = 0;
  std::string error = {};
};

std::mutex mutex;
Launch* active = nullptr;
Settings chosen;
Counts counted = {};
std::string error_of_last;
std::vector<std::unique_ptr<Fiber>> idle_fibers;
std::vector<std::unique_ptr<Guarded>> idle_stacks;

std::vector<Fiber*>& list_of(Fiber* f) {
  return f->state == State::polling ? active->polling
         : f->starved               ? active->starved
                                    : active->ready;
}
void take_out(Fiber* f) {
  std::vector<Fiber*>& list = list_of(f);
  list.back()->place = f->place;
  list[f->place] = list.back();
  list.pop_back();
}
void put_in(Fiber* f, State state) {
  f->state = state;
  if (state == State::ready || state == State::polling) {
    std::vector<Fiber*>& list = list_of(f);
    f->place = list.size();
    list.push_back(f);
  }
}

void switch_to(Fiber* f) {
  active->current = f;
  threadIdx = {f->thread, 0, 0};
  blockIdx = f->cta->index;
  if (has_tsan) __tsan_switch_to_fiber(f->tsan, 1);
  switch_context(active->main, f->context);
}
/// Returns to the scheduler until it chooses this fiber again.
void leave(State state, Where where) {
  Fiber* f = active->current;
  f->where = where;
  if (f->state != State::polling || state != State::polling) {
    take_out(f);
    put_in(f, state);
    active->idle_polls = 0;
  }
  if (has_tsan) __tsan_switch_to_fiber(active->main_tsan, 1);
  switch_context(f->context, active->main);
}

std::string describe(const Fiber* f) {
  const Index3 b = f->cta->index;
  char text[160];
  std::snprintf(text, sizeof(text), "thread %u of CTA (%u, %u, %u) in %s, line %d", f->thread, b.x,
                b.y, b.z, f->where.what, f->where.line);
  return text;
}

/// Ends the launch, from inside a fiber or from the scheduler.
void fail(const std::string& what) {
  if (active->error.empty()) active->error = what + ", kernel " + active->name;
}
[[noreturn]] void fail_here(const std::string& what, Where where) {
  active->current->where = where;
  fail(what + ": " + describe(active->current));
  for (;;) leave(State::waiting, where);
}

/// All threads of a barrier have arrived: they must see each other's relaxed words.
void meet_relaxed(const Barrier& barrier) {
  const Hidden hidden;
  const Fiber* const self = active->current;
  if (&barrier == &self->cta->cluster->barrier) {
    for (Cta* cta : self->cta->cluster->ctas) {
      if (cta) active->relaxed.arrive(cta, -1);
    }
    return;
  }
  ThreadSet threads;
  threads.set(self->thread);
  for (const Fiber* f : barrier.waiting) threads.set(f->thread);
  for (RelaxedWord* w : self->cta->relaxed) {
    if ((w->known & threads).any()) w->known |= threads;
  }
}

void arrive(Barrier& barrier, Where where, bool orders) {
  Fiber* const self = active->current;
  ++counted.waits;
  if (barrier.gone) fail_here("a thread waits for others that have left the kernel", where);
  if (!barrier.waiting.empty() && barrier.waiting[0]->where.what != where.what) {
    fail_here("threads of a warp meet in different places", where);
  }
  if (orders) release(&barrier);
  if (barrier.waiting.size() + 1 < barrier.size) {
    barrier.waiting.push_back(self);
    leave(State::waiting, where);
  } else {
    if (orders && !active->relaxed.empty()) meet_relaxed(barrier);
    for (Fiber* f : barrier.waiting) put_in(f, State::ready);
    barrier.waiting.clear();
    leave(State::ready, where);  // the last to arrive need not be the first to go on
  }
  if (orders) acquire(&barrier);
}

Warp& own_warp() { return active->current->cta->warps[active->current->thread / 32]; }

void enter() {
  for (;;) {  // a fiber whose thread has ended is reused from here
    Launch& l = *active;
    Fiber* const f = l.current;
    l.thread(l.kernel, f->cta->shared->data());
    Cta& cta = *f->cta;
    Warp& warp = own_warp();
    ++cta.gone;
    ++cta.barrier.gone;
    ++warp.barrier.gone;
    ++warp.exchange.gone;
    Barrier& of_cluster = cta.cluster->barrier;
    ++of_cluster.gone;
    const auto check = [](const Barrier& b) {
      if (b.waiting.empty()) return;
      fail("a thread left the kernel while others wait for it: " + describe(b.waiting[0]));
    };
    for (Barrier* b : {&cta.barrier, &warp.barrier, &warp.exchange, &of_cluster}) check(*b);
    for (const Barrier& b : cta.named) {
      if (b.size > l.threads - cta.gone) check(b);
    }
    release(&l);
    --l.alive;
    leave(State::gone, {"end", 0});
  }
}

Fiber* new_fiber() {
  if (!idle_fibers.empty() && !has_tsan) {
    Fiber* f = idle_fibers.back().release();
    idle_fibers.pop_back();
    return f;
  }
  Fiber* f = new Fiber;
  if (idle_stacks.empty()) {
    f->stack = std::make_unique<Guarded>(kStack);
  } else {
    f->stack = std::move(idle_stacks.back());
    idle_stacks.pop_back();
  }
  make_context(f->context, f->stack->data(), kStack, enter);
  if (has_tsan) f->tsan = __tsan_create_fiber(0);
  return f;
}

void start_cta(Index3 index, const std::shared_ptr<Cluster>& cluster) {
  Launch& l = *active;
  ++counted.ctas;
  auto cta = std::make_unique<Cta>();
  cta->index = index;
  cta->cluster = cluster;
  cluster->ctas.push_back(cta.get());
  cta->barrier.expect(l.threads);
  for (Barrier& b : cta->named) b.expect(l.threads);
  cta->warps.resize((l.threads + 31) / 32);
  for (size_t w = 0; w < cta->warps.size(); ++w) {
    const unsigned lanes = std::min(32u, l.threads - 32 * unsigned(w));
    cta->warps[w].barrier.expect(lanes);
    cta->warps[w].exchange.expect(lanes);
  }
  cta->shared = std::make_unique<Guarded>((l.grid.shared + 15) / 16 * 16);
  std::fill_n(cta->shared->data(), cta->shared->size(), 0xff);
  const unsigned starved_warp = unsigned(l.random() % cta->warps.size());
  const bool starved_cta = l.order == Order::starving_cta && index.x == l.random() % l.grid.x;
  for (unsigned t = 0; t < l.threads; ++t) {
    Fiber* f = new_fiber();
    f->cta = cta.get();
    f->thread = t;
    f->where = {"start", 0};
    f->starved = starved_cta || (l.order == Order::starving_warp && t / 32 == starved_warp);
    cta->fibers.push_back(f);
    put_in(f, State::ready);
  }
  l.alive += l.threads;
  for (auto* list : {&l.ready, &l.starved, &l.polling}) list->reserve(l.alive);
  l.ctas.push_back(std::move(cta));
}

/// Keeps an ended thread's fiber, and only the stack of an aborted thread. With ThreadSanitizer it
/// keeps only stacks: each thread is a new fiber there.
void give_back(Fiber* f) {
  if (has_tsan) {
    __tsan_destroy_fiber(f->tsan);
  } else if (f->state == State::gone) {
    idle_fibers.emplace_back(f);
    return;
  }
  idle_stacks.push_back(std::move(f->stack));
  delete f;
}

/// Tries of one thread until a clock that moves at each look has moved past the limit.
constexpr size_t kMostTries = size_t(cuda::WaitTime::kTries) * (cuda::WaitTime::kTicks + 2);

Fiber* next() {
  Launch& l = *active;
  const auto any = [&](std::vector<Fiber*>& list) { return list[l.random() % list.size()]; };
  if (l.clock_moves && l.ready.empty() && l.starved.empty()) {
    // Each thread in turn until it has waited too long: its own limit is a number of tries.
    return l.polling[l.idle_polls++ / kMostTries % l.polling.size()];
  }
  if (!l.polling.empty() && (l.ready.empty() || l.random() % 16 == 0)) {
    // A starved thread goes on only if the others can't without it. In a large launch some of them
    // have tried: all would try thousands of times for each of its words.
    const size_t tries = std::min<size_t>(l.polling.size(), l.is_large ? 256 : SIZE_MAX);
    if (!l.ready.empty() || l.starved.empty() || l.idle_polls <= tries) {
      ++l.idle_polls;
      return l.polling[l.next_poll++ % l.polling.size()];
    }
  }
  std::vector<Fiber*>& list = l.ready.empty() ? l.starved : l.ready;
  switch (l.order) {
    case Order::warps:
      if (Fiber* last = l.current) {
        for (Fiber* f : last->cta->fibers) {
          if (f->thread / 32 == last->thread / 32 && f->state == State::ready) return f;
        }
      }
      return any(list);
    case Order::in_turn:
      return list.front();
    case Order::last_first:
      return list.back();
    default:
      return any(list);
  }
}

/// Where all threads wait.
std::string places() {
  std::map<std::string, unsigned> places;
  std::string text;
  unsigned shown = 0;
  for (const auto& cta : active->ctas) {
    for (const Fiber* f : cta->fibers) {
      if (f->state == State::gone) continue;
      char place[120];
      std::snprintf(place, sizeof(place), "CTA (%u, %u, %u) in %s, line %d", cta->index.x,
                    cta->index.y, cta->index.z, f->where.what, f->where.line);
      ++places[place];
    }
  }
  for (const auto& [place, count] : places) {
    if (++shown > 8) break;
    text += "; " + std::to_string(count) + " threads of " + place;
  }
  return text;
}

/// When nothing can go on: threads that wait for other CTAs look at the clock until they give up.
/// Other threads wait forever.
void on_deadlock() {
  Launch& l = *active;
  if (l.clock_moves) {
    return fail((l.polling.empty() ? "deadlock" : "livelock: nothing comes that is waited for") +
                places());
  }
  l.clock_moves = true;
  l.idle_polls = 0;
  for (const auto& cta : l.ctas) {
    for (auto& [at, barrier] : cta->tx_barriers) {
      for (Fiber* f : barrier.waiting) put_in(f, State::ready);
      barrier.waiting.clear();
    }
  }
}

void complete_phase(TxBarrier& barrier) {
  if (!barrier.announced || barrier.pending != 0) return;
  barrier.announced = false;
  ++barrier.phases;
  for (Fiber* f : barrier.waiting) put_in(f, State::ready);
  barrier.waiting.clear();
}

/// The offset of `bytes` at p in the running CTA's shared memory.
size_t offset_of(const void* p, size_t bytes, Where where) {
  const Guarded& shared = *active->current->cta->shared;
  const auto at = size_t(static_cast<const unsigned char*>(p) - shared.data());
  if (at + bytes > shared.size() || at % bytes) {
    fail_here("no address in shared memory, or a misaligned one", where);
  }
  return at;
}
TxBarrier& own_barrier(void* p, Where where) {
  std::map<size_t, TxBarrier>& barriers = active->current->cta->tx_barriers;
  const auto found = barriers.find(offset_of(p, sizeof(uint64_t), where));
  if (found == barriers.end()) fail_here("a barrier that was not initialised", where);
  return found->second;
}

/// Delivers any one store in flight.
void deliver() {
  Launch& l = *active;
  std::swap(l.in_flight[l.random() % l.in_flight.size()], l.in_flight.back());
  const Message m = l.in_flight.back();
  l.in_flight.pop_back();
  l.idle_polls = 0;
  for (unsigned i = 0; i < m.bytes; ++i) m.to->shared->data()[m.at + i] = m.data[i];
  const auto found = m.to->tx_barriers.find(m.barrier);
  if (found == m.to->tx_barriers.end()) return fail("bytes for a barrier that was not initialised");
  TxBarrier& barrier = found->second;
  barrier.pending -= m.bytes;
  if (barrier.announced && barrier.pending < 0) fail("more bytes than announced");
  complete_phase(barrier);
}

/// Some of the words arrive. `stuck`: nothing else can go on. Held words arrive if no others can.
void deliver_relaxed(bool stuck) {
  Launch& l = *active;
  const bool held = l.relaxed.list(false).empty();
  if (held && !stuck) return;
  const Hidden hidden;
  const WordList& list = l.relaxed.list(held);
  const size_t count = 1 + l.random() % (1 + (list.size() - 1) / l.hurry);
  for (size_t i = 0; i < count; ++i) l.relaxed.arrive(list[l.random() % list.size()]);
  l.idle_polls = 0;
}

void run_all() {
  Launch& l = *active;
  const uint64_t size = std::max(1u, l.grid.cluster);
  const uint64_t total = uint64_t(l.grid.x) * l.grid.y * l.grid.z / size;  // clusters
  const uint64_t together = l.grid.resident ? total : 1 + l.random() % 3;
  std::vector<uint64_t> waiting(total);
  for (uint64_t i = 0; i < total; ++i) waiting[i] = i;
  std::shuffle(waiting.begin(), waiting.end(), l.random);
  for (;;) {
    while (l.ctas.size() + size <= together * size && !waiting.empty()) {
      const auto cluster = std::make_shared<Cluster>();
      cluster->barrier.expect(unsigned(size) * l.threads);
      for (uint64_t i = waiting.back() * size; i < (waiting.back() + 1) * size; ++i) {
        start_cta({unsigned(i % l.grid.x), unsigned(i / l.grid.x % l.grid.y),
                   unsigned(i / l.grid.x / l.grid.y)},
                  cluster);
      }
      waiting.pop_back();
    }
    if (l.alive == 0 && waiting.empty()) {
      const Hidden hidden;
      while (!l.relaxed.empty()) deliver_relaxed(true);
      return;
    }
    const bool idle = l.ready.empty() && l.starved.empty();
    if (!l.in_flight.empty() && (idle || (!l.late_stores && l.random() % 2))) {
      deliver();
      if (!l.error.empty()) return;
      continue;
    }
    // Every polling thread has polled again, and all other threads wait.
    const bool stuck = idle && l.idle_polls >= 2 * l.polling.size();
    if (!l.relaxed.empty() && (stuck || l.random() % 2)) {
      deliver_relaxed(stuck);
      if (stuck) continue;
    }
    if (stuck && (!l.clock_moves || l.idle_polls >= kMostTries * l.polling.size())) {
      on_deadlock();
      if (!l.error.empty()) return;
      continue;
    }
    switch_to(next());
    if (!l.error.empty()) return;
    Cta* const cta = l.current->cta;
    if (cta->gone == l.threads) {  // unmaps its shared memory
      if (std::any_of(l.in_flight.begin(), l.in_flight.end(),
                      [&](const Message& m) { return m.to == cta; })) {
        return fail("a store is in flight to a CTA that has left the kernel");
      }
      acquire(&l);
      for (RelaxedWord* w : cta->relaxed) w->cta = nullptr;
      l.current = nullptr;
      for (Fiber* f : cta->fibers) give_back(f);
      std::vector<Cta*>& of_cluster = cta->cluster->ctas;
      std::replace(of_cluster.begin(), of_cluster.end(), cta, static_cast<Cta*>(nullptr));
      l.ctas.erase(std::find_if(l.ctas.begin(), l.ctas.end(),
                                [&](const auto& c) { return c.get() == cta; }));
    }
  }
}

}  // namespace

std::vector<Kernel>& all_kernels() {
  static std::vector<Kernel> all;  // other files' initialisers use it
  return all;
}

size_t add_kernel(const char* name) {
  // The dots in "static const char* fusedrnn::cuda::Place<Kernel>::name() [with Kernel = ...]".
  std::string text = name;
  const size_t begin = text.find("Kernel = ");
  if (begin != std::string::npos) text = text.substr(begin + 9, text.rfind(']') - begin - 9);
  all_kernels().push_back({text, 0});
  return all_kernels().size() - 1;
}
const std::vector<Kernel>& kernels() { return all_kernels(); }

void set(const Settings& settings) { chosen = settings; }
const Settings& settings() { return chosen; }
const char* last_error() { return error_of_last.c_str(); }
Counts counts() { return counted; }

int launch(const cuda::Grid& grid, unsigned threads, const void* kernel, Thread* thread,
           size_t place) {
  const std::lock_guard<std::mutex> lock(mutex);
  const uint64_t total = uint64_t(grid.x) * grid.y * grid.z;
  // The limits of compute capability 8.0, or 9.0 for clusters.
  if (threads == 0 || threads > 1024 || total == 0 || grid.y > 65535 || grid.z > 65535 ||
      grid.x > 0x7fffffffu || grid.shared > (grid.cluster ? 227 : 99) * 1024u ||
      grid.cluster > 16 || grid.cluster == 1 || (grid.cluster && grid.x % grid.cluster)) {
    error_of_last = "a grid that no device takes";
    return 1;
  }
  if ((grid.resident && total > uint64_t(chosen.room)) || grid.cluster > unsigned(chosen.room)) {
    error_of_last = "more CTAs than can run together";
    return kNoRoom;
  }
  Launch l{grid, threads, kernel, thread};
  l.name = all_kernels()[place].name;
  l.random.seed(chosen.seed + counted.launches);
  ++all_kernels()[place].launches;
  ++counted.launches;
  l.order = Order(l.random() % uint64_t(Order::kCount));
  l.late_stores = l.random() % 4 == 0;
  l.arrival = Arrival(l.random() % uint64_t(Arrival::kCount));
  l.late_cta = unsigned(l.random() % grid.x);
  // In a large launch each arrival waits for thousands of tries, so many words arrive at a time.
  l.is_large = total > 16;
  l.hurry = size_t(1) << l.random() % (l.is_large ? 1 : 8);
  if (has_tsan) l.main_tsan = __tsan_get_current_fiber();
  gridDim = {grid.x, grid.y, grid.z};
  if (grid.cluster) l.in_flight.reserve(1 << 16);  // as in Barrier::expect
  active = &l;
  run_all();
  for (const auto& cta : l.ctas) {
    for (Fiber* f : cta->fibers) give_back(f);
  }
  active = nullptr;
  error_of_last = l.error;
  return l.error.empty() ? 0 : 1;
}

void assertion_failed(const char* message, Where where) { fail_here(message, where); }
void sync_cta(Where where) { arrive(active->current->cta->barrier, where, true); }
void sync_threads(int number, int threads, Where where) {
  Cta& cta = *active->current->cta;
  if (number < 1 || number >= kNamedBarriers) {
    fail_here("barrier " + std::to_string(number) + " is none of 1 to 15", where);
  }
  if (threads < 32 || threads % 32 || unsigned(threads) > active->threads) {
    fail_here("a barrier for " + std::to_string(threads) + " threads: no whole warps of the CTA",
              where);
  }
  Barrier& barrier = cta.named[number];
  if (!barrier.waiting.empty() && barrier.size != unsigned(threads)) {
    fail_here("a barrier for " + std::to_string(threads) + " threads where others wait for " +
                  std::to_string(barrier.size),
              where);
  }
  barrier.size = unsigned(threads);
  if (barrier.waiting.size() + 1 == barrier.size) {
    // A warp arrives as a whole.
    std::map<unsigned, unsigned> lanes = {{active->current->thread / 32, 1}};
    for (const Fiber* f : barrier.waiting) ++lanes[f->thread / 32];
    for (const auto& [warp, count] : lanes) {
      if (count != 32) fail_here("a part of a warp arrives at a barrier", where);
    }
  }
  arrive(barrier, where, true);
}
void sync_warp(Where where) { arrive(own_warp().barrier, where, true); }
void pause(Where where) { leave(State::polling, where); }
void sync_cluster(Where where) { arrive(active->current->cta->cluster->barrier, where, true); }

void barrier_init(void* p, Where where) {
  active->current->cta->tx_barriers[offset_of(p, sizeof(uint64_t), where)].waiting.reserve(
      active->threads);  // as in Barrier::expect
}
void barrier_arrive_and_expect_tx(void* p, uint32_t bytes, Where where) {
  TxBarrier& barrier = own_barrier(p, where);
  if (barrier.announced) fail_here("bytes announced twice in a phase", where);
  release(p);
  barrier.announced = true;
  barrier.pending += bytes;
  if (barrier.pending < 0) fail_here("more bytes than announced", where);
  complete_phase(barrier);
}
bool barrier_try_wait(void* p, uint32_t phase, Where where) {
  TxBarrier& barrier = own_barrier(p, where);
  ++counted.waits;
  // As mbarrier.test_wait.parity: a phase is complete if its parity is not the current phase's.
  if (barrier.phases % 2 == phase) {
    if (active->clock_moves) {
      leave(State::polling, where);
    } else {
      barrier.waiting.push_back(active->current);
      leave(State::waiting, where);
    }
    if (barrier.phases % 2 == phase) return false;
  }
  acquire(p);
  return true;
}
void st_async(const void* data, unsigned bytes, void* to, void* barrier, unsigned cta,
              Where where) {
  const std::vector<Cta*>& ctas = active->current->cta->cluster->ctas;
  if (ctas.size() < 2) fail_here("a store in a cluster of one CTA is undefined in PTX", where);
  if (cta >= ctas.size()) fail_here("a store to a CTA outside of the cluster", where);
  if (!ctas[cta]) fail_here("a store to a CTA that has left the kernel", where);
  const size_t at = offset_of(to, bytes, where);
  const size_t barrier_at = offset_of(barrier, sizeof(uint64_t), where);
  Message m = {ctas[cta], at, barrier_at, {}, bytes};
  for (unsigned i = 0; i < bytes; ++i) m.data[i] = static_cast<const unsigned char*>(data)[i];
  // For ThreadSanitizer the sender writes now. A thread that finds the phase complete has waited
  // for it.
  unsigned char* const shared = ctas[cta]->shared->data();
  if (has_tsan) {
    __tsan_read8(shared + barrier_at);
    __tsan_write_range(shared + at, bytes);
  }
  release(shared + barrier_at);
  active->in_flight.push_back(m);
}

uint64_t nanoseconds() {
  if (active->clock_moves) active->clock += uint64_t(1) << cuda::WaitTime::kTickBits;
  return active->clock;
}
void fail_wait(const cuda::Waiter& waiter, Where where) {
  char text[200];
  std::snprintf(text, sizeof(text), FUSEDRNN_WAIT_ERROR, waiter.name, waiter.hidden_size,
                waiter.rows);
  active->current->where = where;
  fail(text + places());
  for (;;) leave(State::waiting, where);
}

void store_relaxed(uint32_t word, uint32_t* p, Where where) {
  Launch& l = *active;
  if (l.arrival == Arrival::at_once) {
    *p = word;
    return;
  }
  const Fiber* const self = l.current;
  const bool is_held = l.arrival == Arrival::late ||
                       (l.arrival == Arrival::clears_late && word == 0xffffffffu) ||
                       (l.arrival == Arrival::cta_late && self->cta->index.x == l.late_cta);
  {
    const Hidden hidden;
    l.relaxed.add({p, word, self->cta, is_held}, self->thread, l.random() % 2);
  }
  if (l.random() % 16 == 0) leave(State::ready, where);
}
uint32_t find_relaxed(const uint32_t* p, uint32_t in_memory) {
  const Fiber* const self = active->current;
  if (active->relaxed.empty()) return in_memory;
  const RelaxedWord* const found = active->relaxed.find(p, self->cta, self->thread);
  return found ? found->word : in_memory;
}
void fence_device(Where where) {
  Launch& l = *active;
  if (l.relaxed.empty()) return;
  // Other threads may see a part of the words before.
  if (l.random() % 2) leave(State::ready, where);
  const Hidden hidden;
  l.relaxed.arrive(l.current->cta, int(l.current->thread));
}
void check_shared(const void* p, unsigned bytes, Where where) { offset_of(p, bytes, where); }

const unsigned char* exchange(const void* own, unsigned bytes, Where where) {
  Warp& warp = own_warp();
  // Two sets of slots: a lane can be one exchange ahead of the slowest, never two.
  const unsigned lane = active->current->thread % 32;
  unsigned char* const slots = warp.slots[warp.round % 2];
  for (unsigned i = 0; i < bytes; ++i) {
    slots[64 * lane + i] = static_cast<const unsigned char*>(own)[i];
  }
  if (warp.exchange.waiting.size() + 1 == warp.exchange.size) ++warp.round;
  arrive(warp.exchange, where, false);
  return slots;
}

}  // namespace fusedrnn::emulator
