// Linears of one input (q, k, v; k and v of cross-attention) with one gate, on sm_90a: one kernel writes every member's
// y, and one writes dx, which is their sum.
#include <cstdlib>
#include <cstring>

#include "expert_linear/expert_linear.h"
#include "expert_linear/fused.h"
#include "expert_linear/fused_pack.cuh"
#include "expert_linear/wide.h"

namespace fera {
namespace cuda {
namespace {

// Whether every member's h is made inside the product: one kernel makes them, of one padded rank.
bool group_inside(const fera_expert_group_args& g) {
  const auto small = [](const fera_experts& e) { return int64_t{e.experts} * e.rank <= 16; };
  for (int i = 1; i < g.members; ++i)
    if (small(g.member[i].experts) != small(g.member[0].experts)) return false;
  return fused_inside(g.member[0]);
}

// A member's share of the workspace.
size_t share(const fera_expert_group_args& g, int i) { return align256(fused_workspace(g.member[i], group_inside(g))); }
size_t share(const fera_expert_group_backward_args& g, int i) { return align256(fused_workspace(g.member[i])); }

// Of arguments that are not checked yet.
template <class Group>
size_t group_bytes(const Group& g) {
  size_t bytes = 0;
  for (int i = 0; i < g.members && i < FERA_MAX_GROUP; ++i)
    if (g.member[i].experts.rows_per_gate >= 1) bytes += share(g, i);
  return bytes;
}

// The context of a member, with its piece of the workspace at `at`.
fera_context member_context(const fera_context* whole, size_t at, size_t bytes) {
  fera_context context = *whole;
  context.workspace = static_cast<char*>(whole->workspace) + at;
  context.workspace_bytes = bytes;
  return context;
}

}  // namespace
}  // namespace cuda

namespace {

const char* wished() {
  const char* value = std::getenv("FERA_EXPERT_VARIANT");
  return value == nullptr || *value == 0 ? "auto" : value;
}

template <class Group>
fera_status check_group(const char* op, const Group& g) {
  const bool heard = std::strcmp(wished(), "auto") == 0 || std::strcmp(wished(), "wgmma") == 0;
  FERA_CHECK(op, heard, "FERA_EXPERT_VARIANT", "auto or wgmma for a group", wished());
  FERA_CHECK(op, g.members >= 1 && g.members <= FERA_MAX_GROUP, "members", "from 1 to 4", g.members);
  const fera_experts& first = g.member[0].experts;
  for (int i = 0; i < g.members; ++i) {
    const fera_experts& e = g.member[i].experts;
    FERA_RETURN_IF_ERROR(check(g.member[i]));
    FERA_CHECK(op, e.tokens == first.tokens && e.in == first.in, "tokens and in", "those of the first member", e.in);
    FERA_CHECK(op, g.member[i].x.data == g.member[0].x.data && g.member[i].x.dtype == g.member[0].x.dtype, "x",
               "that of the first member", "another");
    FERA_CHECK(op, e.tokens >= 1, "tokens", "at least 1", e.tokens);
    const char* why = cuda::wide_ranks(e) ? "experts * rank is above 32" : cuda::fused_refuses(g.member[i]);
    FERA_CHECK(op, *why == 0, "members", std::string("separate where ") + why, g.members);
  }
  return FERA_OK;
}

}  // namespace

size_t expert_group_workspace_cuda(const fera_expert_group_args& g) { return cuda::group_bytes(g); }
size_t expert_group_backward_workspace_cuda(const fera_expert_group_backward_args& g) { return cuda::group_bytes(g); }
// Whatever single members of that size take: one product for all saves more than it costs.
bool expert_group_takes_cuda(const fera_expert_group_args& g) { return check_group("expert_group", g) == FERA_OK; }
bool expert_group_takes_cuda(const fera_expert_group_backward_args& g) {
  return check_group("expert_group_backward", g) == FERA_OK;
}

}  // namespace fera

extern "C" fera_status fera_expert_group_cuda(const fera_expert_group_args* g, const fera_context* context) {
  using namespace fera;
  using namespace fera::cuda;
  const char* op = "expert_group";
  FERA_RETURN_IF_ERROR(check_group(op, *g));
  FERA_RETURN_IF_ERROR(check_workspace(op, context, expert_group_workspace_cuda(*g)));
  const cudaStream_t stream = stream_of(context);
  Products products{g->members, false, {}};
  Packs packs{};
  const bool inside = group_inside(*g);
  size_t at = 0;
  for (int i = 0; i < g->members; ++i) {
    const size_t bytes = share(*g, i);
    const fera_context own = member_context(context, at, bytes);
    at += bytes;
    FERA_RETURN_IF_ERROR(fused_before(g->member[i], inside, &own, &packs, &products.member[i]));
  }
  launch_pack(g->member[0].x.dtype, packs, stream);
  return launch_products(op, products, stream);
}

extern "C" fera_status fera_expert_group_backward_cuda(const fera_expert_group_backward_args* g,
                                                       const fera_context* context) {
  using namespace fera;
  using namespace fera::cuda;
  const char* op = "expert_group_backward";
  FERA_RETURN_IF_ERROR(check_group(op, *g));
  for (int i = 1; i < g->members; ++i)
    FERA_CHECK(op, g->member[i].dx.data == g->member[0].dx.data, "dx", "that of the first member", "another");
  FERA_RETURN_IF_ERROR(check_workspace(op, context, expert_group_backward_workspace_cuda(*g)));
  const cudaStream_t stream = stream_of(context);
  Products products{g->members, true, {}};
  Packs packs{};
  size_t at = 0;
  for (int i = 0; i < g->members; ++i) {
    const size_t bytes = share(*g, i);
    const fera_context own = member_context(context, at, bytes);
    at += bytes;
    FERA_RETURN_IF_ERROR(fused_before(g->member[i], &own, &packs, &products.member[i]));
  }
  if (g->member[0].dx.data == nullptr) return launch_status(op);
  launch_pack(g->member[0].x.dtype, packs, stream);
  return launch_products(op, products, stream);
}
