// The "wgmma" variant's calls: what it takes, where h (dh) is made, the workspace, the kernels of a call.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "expert_linear/fused.h"
#include "expert_linear/fused_launch.cuh"
#include "expert_linear/fused_pack.cuh"
#include "expert_linear/fused_reduce.h"
#include "expert_linear/skinny.h"
#include "expert_linear/skinny_host.h"
#include "expert_linear/wide.h"

namespace fera::cuda {
namespace {

const char* refuses_device() {
  if (std::strstr(fera_cuda_targets(), "90a") == nullptr) return "the build has no kernels for sm_90a";
  if (hopper() == 0) return "the device is not of sm_90";
  return encoder() == nullptr ? "the driver knows no tensor maps" : "";
}
const char* refuses(const fera_rows& weight, int64_t width) {
  if (weight.data == nullptr) return "the base product is not asked for";
  if (const char* why = refuses_device(); *why != 0) return why;
  if (reinterpret_cast<uintptr_t>(weight.data) % 16 != 0 || weight.stride % 8 != 0 || weight.stride < width)
    return "rows of the weight are not aligned to 16 bytes";
  return "";
}
bool repeats(const fera_rows& r, int64_t width) { return r.stride < width; }  // a tensor map has no stride of 0

// Backward: whether the product's launch leaves partial sums of dA, dB and dgate, of 128 rows each.
bool leaves_sums(Place place) { return place == Place::beside || place == Place::rows; }

// The workspace of a narrow call: A and B in x's dtype, and what the place of h wants.
template <class Args>
struct FusedLayout {
  void *a16, *b16;
  char* skinny;            // outside: the skinny products'
  int* ready;              // beside, and so the rest: the queue and the flags
  void* u;                 // (T, R padded)
  float *db, *da, *gates;  // backward: partial sums
  size_t bytes;
  FusedLayout(const Args& a, Place place, void* base) {
    constexpr bool kBack = std::is_same_v<Args, fera_expert_update_backward_args>;
    const fera_experts& e = a.experts;
    Workspace workspace(base);
    skinny = workspace.take<char>(place == Place::outside ? static_cast<int64_t>(skinny_workspace(a)) : 0);
    a16 = workspace.take<Half>(e.in * padded(e));
    b16 = workspace.take<Half>(e.out * padded(e));
    const bool beside = place == Place::beside;
    ready = workspace.take<int>(beside ? 1 + beside_flags(e.tokens) : 0);
    u = workspace.take<Half>(beside ? e.tokens * padded(e) : 0);
    const bool sums = leaves_sums(place);
    const int64_t slices = sums && kBack ? ceil_div(e.tokens, int64_t{kFusedRows}) : 0;
    if constexpr (kBack) {
      db = workspace.take<float>(a.db ? slices * e.out * stacked_of(e) : 0);
      da = workspace.take<float>(a.da ? slices * e.in * stacked_of(e) : 0);
      gates = workspace.take<float>(a.dgate && sums ? gate_tiles(e) * 2 * padded(e) : 0);
    }
    bytes = workspace.used();
  }
  static int64_t gate_tiles(const fera_experts& e) { return ceil_div(e.tokens, int64_t{kBesideGateRows}); }
};
template <class Args>
FusedLayout<Args> layout(const Args& a, Place place, void* base) {
  return {a, place, base};
}

// A as (rank, in), B as (out, rank) or (rank, out), in x's dtype.
Pack pack_a(const fera_experts& e, void* to) {
  const int in = static_cast<int>(e.in);
  return {e.lora_a, e.a_dtype == FERA_F32, e.in, 1, e.experts * e.rank, in, padded(e), in, to};
}
Pack pack_b(const fera_experts& e, void* to) {
  const int out = static_cast<int>(e.out), stacked = e.experts * e.rank;
  return {e.lora_b, e.b_dtype == FERA_F32, stacked, 1, out, stacked, out, padded(e), to};
}
Pack pack_b_across(const fera_experts& e, void* to) {
  const int out = static_cast<int>(e.out), stacked = e.experts * e.rank;
  return {e.lora_b, e.b_dtype == FERA_F32, 1, stacked, stacked, out, padded(e), out, to};
}

Narrow narrow_of(const fera_experts& e, const void* narrow, void* h) {
  return {narrow,
          static_cast<const float*>(e.gate),
          static_cast<int>(e.rows_per_gate),
          e.experts,
          e.rank,
          static_cast<float>(e.scale),
          h};
}

// Zeros before the first of a call's kernels reads the queue and the flags; in numbers of 16 bits.
Pack clear(int* ready, int64_t tokens) {
  return {nullptr, false, 0, 0, 0, 0, 1, static_cast<int>(2 * (1 + beside_flags(tokens))), ready};
}

// The product of a call and the weights to pack for it; u where its own kernel will write it.
void plan(const fera_expert_update_args& a, Place place, void* workspace, Packs* packs, Product* p) {
  const fera_experts& e = a.experts;
  const auto l = layout(a, place, workspace);
  *p = {a.x, a.weight, a.y, false, a.bias, l.u, l.b16, e.tokens, e.out, e.in, padded(e), {}, {}};
  packs->piece[packs->pieces++] = pack_b(e, l.b16);
  if (place == Place::outside) {
    p->u = skinny_gated(a, l.skinny);
    return;
  }
  packs->piece[packs->pieces++] = pack_a(e, l.a16);
  p->narrow = narrow_of(e, l.a16, a.h);
  if (place != Place::beside) return;
  packs->piece[packs->pieces++] = clear(l.ready, e.tokens);
  p->items.ready = l.ready;
}
void plan(const fera_expert_update_backward_args& a, Place place, void* workspace, Packs* packs, Product* p) {
  const fera_experts& e = a.experts;
  const auto l = layout(a, place, workspace);
  *p = {a.dy, a.weight, a.dx, true, nullptr, l.u, l.a16, e.tokens, e.in, e.out, padded(e), {}, {}};
  if (a.dx.data != nullptr) packs->piece[packs->pieces++] = pack_a(e, l.a16);
  if (place == Place::outside) {
    p->u = skinny_gated(a, l.skinny);
    return;
  }
  packs->piece[packs->pieces++] = pack_b_across(e, l.b16);
  p->narrow = narrow_of(e, l.b16, nullptr);
  if (place == Place::beside) packs->piece[packs->pieces++] = clear(l.ready, e.tokens);
  p->items = {l.ready, a.h, a.db ? l.db : nullptr, a.da ? l.da : nullptr, a.dgate ? l.gates : nullptr};
}

// The reduction of the partial sums that the product's launch left.
ReduceArgs sums_of(const fera_expert_update_backward_args& a, Place place, void* workspace) {
  const auto l = layout(a, place, workspace);
  const int slices = static_cast<int>(ceil_div(a.experts.tokens, int64_t{kFusedRows}));
  return reduce_of(a, {l.da, l.db, l.gates, slices, slices, kBesideGateRows});
}

// The kernels that make u, where the product does not.
template <class Args>
fera_status before(const Args& a, void* workspace, bool follows, const fera_context* context) {
  fera_context own = *context;
  own.workspace = layout(a, Place::outside, workspace).skinny;
  return skinny_before(a, follows, &own);
}

}  // namespace

fera_status launch_products(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  if (p.place == Place::inside) return launch_products<Place::inside>(op, p, follows, stream);
  if (p.place == Place::turns) return launch_turns(op, p, follows, stream);
  if (p.place == Place::beside) return launch_products<Place::beside>(op, p, follows, stream);
  if (p.place == Place::rows) return launch_rows(op, p, follows, stream);
  if (p.place == Place::wide) return launch_wide_products(op, p, follows, stream);
  return launch_products<Place::outside>(op, p, follows, stream);
}

bool fused_needs_weight(const fera_expert_update_backward_args& a) {
  return a.dx.data != nullptr || !wide_ranks(a.experts);
}

const char* fused_refuses(const fera_expert_update_args& a) {
  if (a.experts.dropout > 0) return "dropout is asked for";  // x goes from memory to the tensor cores untouched
  const char* why = wide_ranks(a.experts) ? wide_refuses(a) : skinny_refuses(a);
  if (*why == 0) why = refuses(a.weight, a.experts.in);
  if (*why == 0 && repeats(a.x, a.experts.in)) why = "rows of x repeat";
  if (*why == 0 && reinterpret_cast<uintptr_t>(a.bias) % 4 != 0) why = "the bias is not aligned to 4 bytes";
  return why;
}
const char* fused_refuses(const fera_expert_update_backward_args& a) {
  if (a.experts.dropout > 0) return "dropout is asked for";  // x goes from memory to the tensor cores untouched
  const char* why = wide_ranks(a.experts) ? wide_refuses(a) : skinny_refuses(a);
  // Without dx, kernels of their own make the gradients of wide ranks: they read no weight.
  if (*why == 0) why = fused_needs_weight(a) ? refuses(a.weight, a.experts.in) : refuses_device();
  if (*why == 0 && repeats(a.dy, a.experts.out)) why = "rows of dy repeat";
  return why;
}

// For tests and timings: outside, inside, turns, beside or rows; NULL where nobody wishes.
static const char* wished_place() {
  const char* wish = std::getenv("FERA_EXPERT_PLACE");
  return wish == nullptr || *wish == 0 ? nullptr : wish;
}

// Up to there the ends of tiles are so much of the time that narrower tiles by warpgroups in turns take less, where a
// multiprocessor has more than one (H200, forward: 28 to 26 us at 16384 x 640, three of them 78 to 68).
constexpr int64_t kMostTurnsDepth = 1536;

// Inside, h costs its share of the product, again in every column tile of about 200. Beside, 128 rows of x are read by
// one multiprocessor before the tiles of those rows can end; that pays where the share is above some 15 us (H200:
// inside wins by 3 % of the forward pass at 4608 x 3072 x 3072, loses as much at 4608 x 3072 x 12288).
// Wide ranks: beside the product's tiles, unless tiles of rows, which end with their gate row, would be far from full,
// the weights of each gate row large, tokens so few that blocks should share a loop over k, or weights so large that
// the wider tiles of the product alone read less (H200: at 3072 x 12288 by a tenth).
constexpr int64_t kLeastWideTokens = 256, kFewWideTokens = 1024, kMostWideWeights = 25000000;
static Place wide_place(const fera_experts& e) {
  if (const char* wish = wished_place()) return std::strcmp(wish, "outside") == 0 ? Place::outside : Place::wide;
  const int64_t gates = e.tokens / e.rows_per_gate;
  const bool fills = 8 * wide_flags(e) * kFusedRows <= 9 * e.tokens || e.tokens <= kFewWideTokens;
  const bool few_gates = 2 * gates * stacked_of(e) <= std::max(e.tokens, kFewWideTokens);
  return e.tokens >= kLeastWideTokens && e.in * e.out <= kMostWideWeights && fills && few_gates ? Place::wide
                                                                                                : Place::outside;
}
Place fused_place(const fera_expert_update_args& a) {
  if (wide_ranks(a.experts)) return wide_place(a.experts);
  if (const char* wish = wished_place())
    return std::strcmp(wish, "inside") == 0   ? Place::inside
           : std::strcmp(wish, "turns") == 0  ? Place::turns
           : std::strcmp(wish, "beside") == 0 ? Place::beside
                                              : Place::outside;
  const fera_experts& e = a.experts;
  const double product = static_cast<double>(e.tokens) * static_cast<double>(e.in) * static_cast<double>(e.out);
  const int64_t tiles = ceil_div(e.tokens, int64_t{kFusedRows}) * ceil_div(e.out, int64_t{160});
  if (e.in <= kMostTurnsDepth && 2 * tiles >= int64_t{3} * hopper()) return Place::turns;
  return 2 * product * padded(e) / 200 / 7e14 < 15e-6 ? Place::inside : Place::beside;
}

// By rows, where their blocks leave few multiprocessors idle, and a block's start and ends, which nothing runs beside,
// are little of it (H200, the backward pass in us, beside and by rows: 26.3 and 17.4 at 16384 x 320, 47.8 and 40.9 at
// 16384 x 640, 35.5 and 29.9 at 4096 x 1280, 22.0 and 16.5 at 12288 x 320, 30.7 and 28.0 at 3072 x 1280, 57.4 and 57.0
// at 8192 x 1280 in two passes; but 17.3 and 19.3 at 4096 x 640, 36.8 and 37.4 at 12288 x 640, 337 and 373 at 16384 x
// 2432).
static bool suits_rows(const fera_experts& e) {
  if (hopper() == 0) return false;
  const RowsCut cut = cut_rows(e.tokens, e.in, e.out);
  const int64_t waves = ceil_div(cut.blocks, int64_t{hopper()}), places = waves * hopper();
  if (cut.passes == 1) return 100 * cut.blocks >= 65 * places && (waves == 1 || e.out <= 640);
  return cut.passes == 2 && 100 * cut.blocks >= 85 * places && waves == 1;
}

// Elsewhere backward the items beside the tiles read dy once for dh and dB, and x once for dA, while other
// multiprocessors multiply.
Place fused_place(const fera_expert_update_backward_args& a) {
  const char* wish = wished_place();
  if (a.dx.data == nullptr || repeats(a.x, a.experts.in)) return Place::outside;
  if (wide_ranks(a.experts)) return wide_place(a.experts);
  if (wish != nullptr && std::strcmp(wish, "outside") == 0) return Place::outside;
  const bool rows = wish != nullptr ? std::strcmp(wish, "rows") == 0 : suits_rows(a.experts);
  return rows && padded(a.experts) == 16 ? Place::rows : Place::beside;
}

template <class Args>
static size_t workspace_of(const Args& a, Place place) {
  if (place == Place::wide) return wide_members_workspace(a);
  return wide_ranks(a.experts) ? wide_workspace(a) : layout(a, place, nullptr).bytes;
}
size_t fused_workspace(const fera_expert_update_args& a, Place place) { return workspace_of(a, place); }
size_t fused_workspace(const fera_expert_update_backward_args& a, Place place) { return workspace_of(a, place); }
size_t fused_workspace(const fera_expert_update_args& a) { return workspace_of(a, fused_place(a)); }
size_t fused_workspace(const fera_expert_update_backward_args& a) { return workspace_of(a, fused_place(a)); }

fera_status fused_members(const char* op, int members, const Call<fera_expert_update_args>* calls, Place place,
                          const fera_context* context) {
  if (place == Place::wide) return wide_members(op, members, calls, context);
  const cudaStream_t stream = stream_of(context);
  Packs packs{};
  Products products{members, false, place, {}, 0, {}};
  for (int i = 0; i < members; ++i) plan(*calls[i].args, place, calls[i].workspace, &packs, &products.member[i]);
  FERA_RETURN_IF_ERROR(launch_pack(op, products.member[0].x.dtype, packs, stream));
  for (int i = 0; i < members && place == Place::outside; ++i)
    FERA_RETURN_IF_ERROR(before(*calls[i].args, calls[i].workspace, true, context));
  return launch_products(op, products, true, stream);
}

fera_status fused_members(const char* op, int members, const Call<fera_expert_update_backward_args>* calls, Place place,
                          const fera_context* context) {
  if (place == Place::wide) return wide_members(op, members, calls, context);
  const cudaStream_t stream = stream_of(context);
  Packs packs{};
  const fera_expert_update_backward_args& first = *calls[0].args;
  Products products{members, true, place, first.x, first.experts.in, {}};
  const fera_expert_update_backward_args* args[FERA_MAX_GROUP];
  ReduceArgs reduce[FERA_MAX_GROUP];
  for (int i = 0; i < members; ++i) {
    args[i] = calls[i].args;
    plan(*args[i], place, calls[i].workspace, &packs, &products.member[i]);
    if (leaves_sums(place)) reduce[i] = sums_of(*args[i], place, calls[i].workspace);
  }
  const bool packed = packs.pieces > 0;
  if (packed) FERA_RETURN_IF_ERROR(launch_pack(op, products.member[0].x.dtype, packs, stream));
  for (int i = 0; i < members && place == Place::outside; ++i)
    FERA_RETURN_IF_ERROR(before(*args[i], calls[i].workspace, packed || i > 0, context));
  if (products.member[0].y.data == nullptr) return launch_status(op);
  FERA_RETURN_IF_ERROR(launch_products(op, products, true, stream));
  return leaves_sums(place) ? launch_reduce(op, members, padded(first.experts), reduce, stream) : FERA_OK;
}

fera_status fused_launch(const fera_expert_update_args& a, const fera_context* context) {
  const char* op = "expert_update";
  const fera_experts& e = a.experts;
  const Place place = fused_place(a);
  if (!wide_ranks(e) || place == Place::wide) {
    const Call<fera_expert_update_args> call{&a, context->workspace};
    return fused_members(op, 1, &call, place, context);
  }
  LowRank term{};
  FERA_RETURN_IF_ERROR(wide_down(a, context, &term));
  const Product product{a.x, a.weight, a.y, false, a.bias, term.u, term.v, e.tokens, e.out, e.in, term.rank, {}, {}};
  return launch_products(op, {1, false, Place::outside, {}, 0, {product}}, true, stream_of(context));
}

fera_status fused_launch(const fera_expert_update_backward_args& a, const fera_context* context) {
  const char* op = "expert_update_backward";
  const fera_experts& e = a.experts;
  const Place place = fused_place(a);
  if (!wide_ranks(e) || place == Place::wide) {
    const Call<fera_expert_update_backward_args> call{&a, context->workspace};
    return fused_members(op, 1, &call, place, context);
  }
  LowRank term{};
  FERA_RETURN_IF_ERROR(wide_across(a, context, &term));
  if (a.dx.data == nullptr) return FERA_OK;
  const Product product{a.dy, a.weight, a.dx, true, nullptr, term.u, term.v, e.tokens, e.in, e.out, term.rank, {}, {}};
  return launch_products(op, {1, false, Place::outside, {}, 0, {product}}, true, stream_of(context));
}

}  // namespace fera::cuda
