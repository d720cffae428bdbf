// expert_group against its members one by one: the same gradients of A, B and gate, and y and h, to the bit where
// the same kernels make them; dx is their sum.
#include <cstdlib>

#include "tests/harness.h"

using namespace test;

namespace {

struct Case {
  fera_dtype dtype, weight_dtype;
  int64_t tokens, in;
  std::vector<int64_t> outs;
  int experts, rank;
  int64_t gates;
  int last_rank = 0;  // of the last member, where it is another
  int rank_of(size_t member) const { return last_rank != 0 && member + 1 == outs.size() ? last_rank : rank; }
  std::string what() const {
    char text[160];
    std::snprintf(text, sizeof text, "%s/%s T=%d in=%d members=%d E=%d r=%d G=%d", name_of(dtype),
                  name_of(weight_dtype), static_cast<int>(tokens), static_cast<int>(in), static_cast<int>(outs.size()),
                  experts, rank, static_cast<int>(gates));
    return text;
  }
};

Array random(fera_dtype t, int64_t count, double scale = 1) {
  Values values = normal(count, scale);
  return Array(FERA_CUDA, t, values);
}

// Everything of one member that a call reads or writes.
struct Member {
  Array weight, bias, a, b, dy, y, h, dx, da, db, dgate;
  Member(const Case& c, int64_t out, int rank)
      : weight(random(c.dtype, out * c.in, 1 / std::sqrt(static_cast<double>(c.in)))),
        bias(random(c.dtype, out)),
        a(random(c.weight_dtype, c.experts * rank * c.in, 1 / std::sqrt(static_cast<double>(c.in)))),
        b(random(c.weight_dtype, out * c.experts * rank)),
        dy(random(c.dtype, c.tokens * out)),
        y(FERA_CUDA, c.dtype, c.tokens * out),
        h(FERA_CUDA, c.dtype, c.tokens * c.experts * rank),
        dx(FERA_CUDA, c.dtype, c.tokens * c.in),
        da(FERA_CUDA, c.weight_dtype, c.experts * rank * c.in),
        db(FERA_CUDA, c.weight_dtype, out * c.experts * rank),
        dgate(FERA_CUDA, FERA_F32, c.gates * c.experts) {}
};

// What a call wrote of a member.
std::vector<std::vector<char>> bits(const Member& m) {
  std::vector<std::vector<char>> all;
  for (const Array* a : {&m.y, &m.h, &m.dx, &m.da, &m.db, &m.dgate}) all.push_back(a->buffer.download());
  return all;
}

void check(const Case& c) {
  const Array x = random(c.dtype, c.tokens * c.in), gate = random(FERA_F32, c.gates * c.experts);
  const int members = static_cast<int>(c.outs.size());
  std::vector<Member> alone, together;
  fera_expert_group_args group{};
  fera_expert_group_backward_args back{};
  group.members = back.members = members;
  Values sum(static_cast<size_t>(c.tokens * c.in), 0.0);
  for (int i = 0; i < members; ++i) {
    alone.emplace_back(c, c.outs[i], c.rank_of(i));
    together.emplace_back(c, c.outs[i], c.rank_of(i));
    const Member &m = alone[i], &n = together[i];
    const fera_experts experts{c.tokens,   c.in,           c.outs[i],  c.experts,      c.rank_of(i), c.tokens / c.gates,
                               m.a.data(), c.weight_dtype, m.b.data(), c.weight_dtype, gate.data(),  0.6};
    fera_expert_update_args f{};
    f.experts = experts;
    f.x = {x.data(), c.dtype, c.in};
    f.weight = {m.weight.data(), c.dtype, c.in};
    f.bias = i == 1 ? nullptr : m.bias.data();
    f.y = {m.y.data(), c.dtype, c.outs[i]};
    f.h = m.h.data();
    group.member[i] = f;
    group.member[i].y.data = n.y.data();
    group.member[i].h = n.h.data();
    fera_expert_update_backward_args g{};
    g.experts = experts;
    g.x = f.x;
    g.weight = f.weight;
    g.dy = {m.dy.data(), c.dtype, c.outs[i]};
    g.h = m.h.data();
    g.dx = {m.dx.data(), c.dtype, c.in};
    g.da = m.da.data();
    g.db = m.db.data();
    g.dgate = m.dgate.data();
    EXPECT_OK(FERA_RUN(expert_update, FERA_CUDA, f, Threads::none));
    EXPECT_OK(FERA_RUN(expert_update_backward, FERA_CUDA, g, Threads::none));
    const Values dx = m.dx.values();
    for (size_t j = 0; j < sum.size(); ++j) sum[j] += dx[j];
    back.member[i] = g;
    back.member[i].dx.data = together[0].dx.data();
    back.member[i].da = n.da.data();
    back.member[i].db = n.db.data();
    back.member[i].dgate = n.dgate.data();
  }
  // The vectors grew: pointers were taken from elements whose buffers moved along, not from the elements.
  if (fera_expert_group_takes(&group, FERA_CUDA) != 1) fail("a group is not taken: %s", fera_last_error());
  if (fera_expert_group_backward_takes(&back, FERA_CUDA) != 1) fail("backward is not taken: %s", fera_last_error());
  EXPECT_OK(FERA_RUN(expert_group, FERA_CUDA, group, Threads::none));
  EXPECT_OK(FERA_RUN(expert_group_backward, FERA_CUDA, back, Threads::none));
  // Ranks that pad to unlike widths have their h made by a kernel of its own, a member alone may have it made inside
  // the product: the sums over k are then split in other places.
  const auto padded = [&](int i) { return c.experts * c.rank_of(i) <= 16 ? 16 : 32; };
  const bool same_kernels = padded(0) == padded(members - 1);
  const double bound = c.dtype == FERA_F16 ? 1e-3 : 6e-3;
  std::vector<std::vector<std::vector<char>>> first;
  for (int i = 0; i < members; ++i) {
    if (same_kernels) {
      expect_same_bits(alone[i].y.buffer, together[i].y.buffer, "y " + c.what());
      expect_same_bits(alone[i].h.buffer, together[i].h.buffer, "h " + c.what());
    } else {
      expect_close(together[i].y.values(), alone[i].y.values(), bound, "y " + c.what());
      expect_close(together[i].h.values(), alone[i].h.values(), bound, "h " + c.what());
    }
    // Sums over tokens, cut otherwise where several passes share the machine; dgate's terms are of both signs.
    expect_close(together[i].da.values(), alone[i].da.values(), bound, "da " + c.what());
    expect_close(together[i].db.values(), alone[i].db.values(), bound, "db " + c.what());
    expect_close(together[i].dgate.values(), alone[i].dgate.values(), 2 * bound, "dgate " + c.what(),
                 4 * bound * std::sqrt(static_cast<double>(c.experts * c.rank_of(i) * c.tokens)));
    first.push_back(bits(together[i]));
  }
  EXPECT_OK(FERA_RUN(expert_group, FERA_CUDA, group, Threads::none));
  EXPECT_OK(FERA_RUN(expert_group_backward, FERA_CUDA, back, Threads::none));
  for (int i = 0; i < members; ++i)
    if (bits(together[i]) != first[static_cast<size_t>(i)]) fail("other bits the second time, %s", c.what().c_str());
  expect_close(together[0].dx.values(), sum, bound, "dx " + c.what());
}

}  // namespace

int main() {
  setenv("FERA_EXPERT_VARIANT", "wgmma", 1);  // small sizes too, which the dispatcher leaves to other variants
  for (const fera_device device : devices()) {
    fera_expert_update_args f{};
    f.experts = {128, 64, 64, 3, 4, 64, nullptr, FERA_F32, nullptr, FERA_F32, nullptr, 1.0};
    f.x = f.y = f.base = f.weight = {nullptr, FERA_BF16, 64};
    char somewhere alignas(16)[16];
    f.weight.data = somewhere;  // only its alignment is read
    if (device == FERA_CPU || std::strcmp(fera_expert_variant(&f, device), "wgmma") != 0) {
      fera_expert_group_args group{};
      group.members = 1;
      group.member[0] = f;
      if (fera_expert_group_takes(&group, device) != 0) fail("a group is taken on %s", name_of(device));
      if (device == FERA_CPU && FERA_RUN(expert_group, device, group) != FERA_UNSUPPORTED)
        fail("a group ran on the CPU");
      done("expert_group is left to its members", device);
      continue;
    }
    for (const Case& c : {Case{FERA_BF16, FERA_F32, 300, 320, {320, 320, 320}, 3, 4, 3},
                          Case{FERA_F16, FERA_F16, 154, 72, {648, 40}, 2, 16, 2},
                          Case{FERA_BF16, FERA_F32, 1040, 640, {200, 1032, 8, 320}, 3, 4, 1},
                          Case{FERA_BF16, FERA_BF16, 96, 136, {64}, 3, 5, 1},
                          Case{FERA_BF16, FERA_F32, 300, 320, {320, 200}, 3, 4, 3, 8},
                          Case{FERA_BF16, FERA_F32, 300, 320, {320, 200}, 3, 8, 3, 4}})
      check(c);
    // Backward by rows, in blocks of one pass over dx and of two.
    setenv("FERA_EXPERT_PLACE", "rows", 1);
    for (const char* columns : {"320", "640"}) {
      setenv("FERA_EXPERT_TILE", columns, 1);
      for (const Case& c : {Case{FERA_BF16, FERA_F32, 300, 320, {320, 320, 320}, 3, 4, 3},
                            Case{FERA_F16, FERA_F16, 154, 648, {136, 40}, 2, 8, 2},
                            Case{FERA_BF16, FERA_F32, 1040, 648, {200, 1032, 8, 320}, 3, 4, 1}})
        if (!brief() || c.tokens < 400) check(c);
    }
    unsetenv("FERA_EXPERT_TILE");
    unsetenv("FERA_EXPERT_PLACE");
    // Wide ranks, whose members join beside the product's tiles alone; other ranks, and few tokens, are left to
    // members.
    setenv("FERA_EXPERT_PLACE", "beside", 1);
    for (const Case& c : {Case{FERA_BF16, FERA_F32, 300, 320, {320, 320, 320}, 3, 16, 3},
                          Case{FERA_F16, FERA_F16, 154, 72, {648, 40}, 4, 32, 1},
                          Case{FERA_BF16, FERA_F32, 1040, 456, {200, 1032, 8, 320}, 4, 40, 2}})
      if (!brief() || c.tokens < 400) check(c);
    unsetenv("FERA_EXPERT_PLACE");
    done("expert_group", device);
  }
  return finish();
}
