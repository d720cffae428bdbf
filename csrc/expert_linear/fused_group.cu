// Linears of one input (q, k, v; k and v of cross-attention) with one gate, on sm_90a: one kernel writes every member's
// y, and one writes dx, which is their sum.
#include <cstdlib>
#include <cstring>

#include "expert_linear/expert_linear.h"
#include "expert_linear/fused.h"
#include "expert_linear/fused_pack.cuh"
#include "expert_linear/skinny.h"
#include "expert_linear/wide.h"

namespace fera {
namespace cuda {
namespace {

// A member's share of the workspace.
size_t share(const fera_expert_group_args& g, int i) {
  return align256(fused_workspace(g.member[i], fused_inside(g.member[0])));
}
size_t share(const fera_expert_group_backward_args& g, int i) { return align256(fused_workspace(g.member[i])); }

template <class Group>
size_t group_bytes(const Group& g) {
  size_t bytes = 0;
  for (int i = 0; i < g.members; ++i) bytes += share(g, i);
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

template <class Group>
fera_status check_group(const char* op, const Group& g) {
  FERA_CHECK(op, g.members >= 1 && g.members <= FERA_MAX_GROUP, "members", "from 1 to 4", g.members);
  const fera_experts& first = g.member[0].experts;
  for (int i = 0; i < g.members; ++i) {
    const fera_experts& e = g.member[i].experts;
    FERA_RETURN_IF_ERROR(check(g.member[i]));
    FERA_CHECK(op, e.tokens == first.tokens && e.in == first.in, "tokens and in", "those of the first member", e.in);
    FERA_CHECK(op, g.member[i].x.data == g.member[0].x.data && g.member[i].x.dtype == g.member[0].x.dtype, "x",
               "that of the first member", "another");
    if (e.tokens == 0) continue;
    const char* why = cuda::wide_ranks(e) ? "experts * rank is above 32" : cuda::fused_refuses(g.member[i]);
    FERA_CHECK(op, *why == 0, "members", std::string("separate where ") + why, g.members);
  }
  return FERA_OK;
}

}  // namespace

namespace {

bool wished() {
  const char* value = std::getenv("FERA_EXPERT_VARIANT");
  return value == nullptr || *value == 0 || std::strcmp(value, "auto") == 0 || std::strcmp(value, "wgmma") == 0;
}

}  // namespace

size_t expert_group_workspace_cuda(const fera_expert_group_args& g) { return cuda::group_bytes(g); }
size_t expert_group_backward_workspace_cuda(const fera_expert_group_backward_args& g) { return cuda::group_bytes(g); }
// Whatever single members of that size take: one product for all saves more than it costs.
bool expert_group_takes_cuda(const fera_expert_group_args& g) {
  return wished() && check_group("expert_group", g) == FERA_OK;
}
bool expert_group_takes_cuda(const fera_expert_group_backward_args& g) {
  return wished() && check_group("expert_group_backward", g) == FERA_OK;
}

}  // namespace fera

extern "C" fera_status fera_expert_group_cuda(const fera_expert_group_args* g, const fera_context* context) {
  using namespace fera;
  using namespace fera::cuda;
  const char* op = "expert_group";
  FERA_RETURN_IF_ERROR(check_group(op, *g));
  if (g->member[0].experts.tokens == 0) return FERA_OK;
  FERA_RETURN_IF_ERROR(check_workspace(op, context, expert_group_workspace_cuda(*g)));
  const cudaStream_t stream = stream_of(context);
  Products products{g->members, false, {}};
  Packs packs{};
  const bool inside = fused_inside(g->member[0]);
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
  if (g->member[0].experts.tokens == 0) return FERA_OK;
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
