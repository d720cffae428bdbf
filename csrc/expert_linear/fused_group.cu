// Linears of one input (q, k, v; k and v of cross-attention) with one gate, on sm_90a: one kernel writes every member's
// y, and one writes dx, which is their sum.
#include <cstdlib>
#include <cstring>

#include "expert_linear/expert_linear.h"
#include "expert_linear/fused.h"
#include "expert_linear/operands.h"
#include "expert_linear/wide.h"

namespace fera {
namespace cuda {
namespace {

// Where every member's h (dh) is made: the product's kernel makes them of one padded rank.
template <class Group>
Place group_place(const Group& g) {
  const fera_experts& first = g.member[0].experts;
  for (int i = 1; i < g.members && !wide_ranks(first); ++i)
    if (padded(g.member[i].experts) != padded(first)) return Place::outside;
  return fused_place(g.member[0]);
}

// Why members are left to themselves, or "".
template <class Group>
const char* refuses(const Group& g, int i) {
  const fera_experts &e = g.member[i].experts, &first = g.member[0].experts;
  if (wide_ranks(e) != wide_ranks(first) || (wide_ranks(e) && stacked_of(e) != stacked_of(first)))
    return "experts * rank differ and are above 32";
  if (wide_ranks(e) && group_place(g) != Place::wide) return "experts * rank is above 32 and tokens are few";
  return fused_refuses(g.member[i]);
}

// A member's share of the workspace.
template <class Group>
size_t share(const Group& g, int i) {
  return align256(fused_workspace(g.member[i], group_place(g)));
}

// Whether there is anything to lay out.
bool sized(const fera_experts& e) { return e.tokens >= 1 && e.in >= 1 && e.out >= 1 && e.rows_per_gate >= 1; }

// Of arguments that are not checked yet.
template <class Group>
size_t group_bytes(const Group& g) {
  size_t bytes = 0;
  for (int i = 0; i < g.members && i < FERA_MAX_GROUP; ++i)
    if (sized(g.member[i].experts)) bytes += share(g, i);
  return bytes;
}

template <class Args, class Group>
fera_status run(const char* op, const Group& g, const fera_context* context) {
  Call<Args> calls[FERA_MAX_GROUP];
  char* at = static_cast<char*>(context->workspace);
  for (int i = 0; i < g.members; ++i) {
    calls[i] = {&g.member[i], at};
    at += share(g, i);
  }
  return fused_members(op, g.members, calls, group_place(g), context);
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
    FERA_CHECK(op, e.rows_per_gate == first.rows_per_gate, "rows_per_gate", "that of the first member",
               e.rows_per_gate);
    FERA_CHECK(op, g.member[i].x.data == g.member[0].x.data && g.member[i].x.dtype == g.member[0].x.dtype, "x",
               "that of the first member", "another");
    FERA_CHECK(op, e.tokens >= 1, "tokens", "at least 1", e.tokens);
    const char* why = cuda::refuses(g, i);
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
  return run<fera_expert_update_args>(op, *g, context);
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
  return run<fera_expert_update_backward_args>(op, *g, context);
}
