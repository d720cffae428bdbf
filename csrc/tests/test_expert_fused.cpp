// expert_update with a weight: base product and low-rank term in one kernel, against triple loops in double.
// Runs where fera_expert_variant says "wgmma"; elsewhere a weight must be refused.
#include <cstdlib>

#include "tests/harness.h"

using namespace test;

namespace {

struct Case {
  fera_dtype dtype, weight_dtype;
  int64_t tokens, in, out;
  int experts, rank;
  int64_t gates;
  bool bias;
  int64_t gap = 0;  // numbers between rows of x, y and the base weight
  std::string what() const {
    char text[160];
    std::snprintf(text, sizeof text, "%s/%s T=%d %d->%d E=%d r=%d G=%d%s gap %d", name_of(dtype), name_of(weight_dtype),
                  static_cast<int>(tokens), static_cast<int>(in), static_cast<int>(out), experts, rank,
                  static_cast<int>(gates), bias ? " bias" : "", static_cast<int>(gap));
    return text;
  }
};

bool place_is(const char* place) {
  const char* wish = std::getenv("FERA_EXPERT_PLACE");
  return wish != nullptr && std::strcmp(wish, place) == 0;
}

// The second run has the bits of the first; where kernels of their own make the gradients of wide ranks, so has each
// that is asked for alone.
void alone(const Case& c, const fera_expert_update_backward_args& whole, const Matrix& dx, const Array& da,
           const Array& db, const Array& dgate) {
  const Buffer* const buffers[] = {&dx.buffer, &da.buffer, &db.buffer, &dgate.buffer};
  const char* const names[] = {"dx", "da", "db", "dgate"};
  std::vector<std::vector<char>> first;
  for (const Buffer* b : buffers) first.push_back(b->download());
  // Bits of what is asked for: dx, da, db, dgate. Elsewhere dA, dB and dgate are made in other kernels without dx.
  const std::vector<unsigned> asked = c.experts * c.rank > 32 && place_is("outside")
                                          ? std::vector<unsigned>{15, 1, 2, 4, 8}
                                          : std::vector<unsigned>{15, 13, 11, 7, 1};
  for (const unsigned mask : asked) {
    fera_expert_update_backward_args some = whole;
    if (!(mask & 1)) some.dx.data = nullptr;
    if (!(mask & 1) && c.experts * c.rank > 32) some.weight.data = nullptr;  // nobody reads it
    if (!(mask & 2)) some.da = nullptr;
    if (!(mask & 4)) some.db = nullptr;
    if (!(mask & 8)) some.dgate = nullptr;
    EXPECT_OK(FERA_RUN(expert_update_backward, FERA_CUDA, some, Threads::none));
    for (int i = 0; i < 4; ++i)
      if ((mask >> i & 1) && buffers[i]->download() != first[static_cast<size_t>(i)])
        fail("other bits of %s where %u is asked for, %s", names[i], mask, c.what().c_str());
  }
}

void check(const Case& c) {
  const int64_t stacked = int64_t{c.experts} * c.rank, each = c.tokens / c.gates;
  const double scale = 0.6, size = 1 / std::sqrt(static_cast<double>(c.in));
  Values x = normal(c.tokens * c.in), w = normal(c.out * c.in, size), dy = normal(c.tokens * c.out),
         bias = normal(c.out), a = normal(stacked * c.in, size), b = normal(c.out * stacked),
         gate = normal(c.gates * c.experts);
  Matrix xs(FERA_CUDA, c.dtype, c.tokens, c.in, c.gap), ys(FERA_CUDA, c.dtype, c.tokens, c.out, c.gap),
      dys(FERA_CUDA, c.dtype, c.tokens, c.out, c.gap), dxs(FERA_CUDA, c.dtype, c.tokens, c.in, c.gap),
      ws(FERA_CUDA, c.dtype, c.out, c.in, c.gap);
  xs.set(x);
  dys.set(dy);
  ws.set(w);
  const Array biases(FERA_CUDA, c.dtype, bias), as(FERA_CUDA, c.weight_dtype, a), bs(FERA_CUDA, c.weight_dtype, b);
  const Array gates(FERA_CUDA, FERA_F32, gate), h(FERA_CUDA, c.dtype, c.tokens * stacked);
  const Array da(FERA_CUDA, c.weight_dtype, stacked * c.in), db(FERA_CUDA, c.weight_dtype, c.out * stacked),
      dgate(FERA_CUDA, FERA_F32, c.gates * c.experts);
  const fera_experts experts{c.tokens,  c.in,           c.out,     c.experts,      c.rank,       each,
                             as.data(), c.weight_dtype, bs.data(), c.weight_dtype, gates.data(), scale};
  fera_expert_update_args f{};
  f.experts = experts;
  f.x = xs.view;
  f.y = ys.view;
  f.h = h.data();
  f.weight = ws.view;
  f.bias = c.bias ? biases.data() : nullptr;
  EXPECT_OK(FERA_RUN(expert_update, FERA_CUDA, f, Threads::none));
  const Values first = ys.values();
  EXPECT_OK(FERA_RUN(expert_update, FERA_CUDA, f, Threads::none));
  if (first != ys.values()) fail("other bits the second time, %s", c.what().c_str());
  fera_expert_update_backward_args g{};
  g.experts = experts;
  g.dy = dys.view;
  g.x = xs.view;
  g.h = h.data();
  g.dx = dxs.view;
  g.da = da.data();
  g.db = db.data();
  g.dgate = dgate.data();
  g.weight = ws.view;
  EXPECT_OK(FERA_RUN(expert_update_backward, FERA_CUDA, g, Threads::none));
  alone(c, g, dxs, da, db, dgate);

  for (double& v : bias) v = rounded(c.dtype, v);
  for (double& v : a) v = rounded(c.dtype, v);
  for (double& v : b) v = rounded(c.dtype, v);
  Values y(static_cast<size_t>(c.tokens * c.out), 0.0), dx(x.size(), 0.0), want_da(a.size(), 0.0),
      want_db(b.size(), 0.0), want_dgate(gate.size(), 0.0), want_h(static_cast<size_t>(c.tokens * stacked));
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t o = 0; o < c.out; ++o) {
      double sum = c.bias ? bias[o] : 0;
      for (int64_t i = 0; i < c.in; ++i) sum += x[t * c.in + i] * w[o * c.in + i];
      y[t * c.out + o] = sum;
      for (int64_t i = 0; i < c.in; ++i) dx[t * c.in + i] += dy[t * c.out + o] * w[o * c.in + i];
    }
    for (int64_t q = 0; q < stacked; ++q) {
      const double factor = gate[t / each * c.experts + q / c.rank] * scale;
      double hidden = 0, back = 0;
      for (int64_t i = 0; i < c.in; ++i) hidden += x[t * c.in + i] * a[q * c.in + i];
      want_h[t * stacked + q] = hidden;
      hidden = rounded(c.dtype, hidden);
      for (int64_t o = 0; o < c.out; ++o) {
        y[t * c.out + o] += factor * hidden * b[o * stacked + q];
        back += dy[t * c.out + o] * b[o * stacked + q];
        want_db[o * stacked + q] += factor * hidden * dy[t * c.out + o];
      }
      want_dgate[t / each * c.experts + q / c.rank] += scale * hidden * back;
      for (int64_t i = 0; i < c.in; ++i) {
        dx[t * c.in + i] += factor * back * a[q * c.in + i];
        want_da[q * c.in + i] += factor * back * x[t * c.in + i];
      }
    }
  }
  const double tolerance = c.dtype == FERA_F16 ? 1e-3 : 6e-3;
  expect_close(ys.values(), y, tolerance, "y " + c.what());
  expect_close(dxs.values(), dx, tolerance, "dx " + c.what());
  // A rounded h may differ by one unit in the last place between summation orders.
  expect_close(h.values(), want_h, tolerance, "h " + c.what());
  expect_close(da.values(), want_da, tolerance, "da " + c.what());
  expect_close(db.values(), want_db, 2 * tolerance, "db " + c.what());
  // Each share is a sum of terms of both signs: the tolerance is of their size.
  expect_close(dgate.values(), want_dgate, 2 * tolerance, "dgate " + c.what(),
               4 * tolerance * std::sqrt(static_cast<double>(stacked * c.tokens)));
}

}  // namespace

int main() {
  setenv("FERA_EXPERT_VARIANT", "wgmma", 1);  // small sizes too, which the dispatcher leaves to other variants
  for (const fera_device device : devices()) {
    const fera_rows rows{nullptr, FERA_BF16, 64};
    fera_expert_update_args f{};
    f.experts = {128, 64, 64, 3, 4, 64, nullptr, FERA_F32, nullptr, FERA_F32, nullptr, 1.0};
    f.x = f.y = f.base = rows;
    f.weight = rows;
    char somewhere alignas(16)[16];
    f.weight.data = somewhere;  // only its alignment is read
    if (device == FERA_CPU || std::strcmp(fera_expert_variant(&f, device), "wgmma") != 0) {
      const Array some(device, FERA_F32, 4096);
      f.experts.lora_a = f.experts.lora_b = f.experts.gate = f.x.data = f.y.data = f.h = some.data();
      if (FERA_RUN(expert_update, device, f) != FERA_INVALID) fail("a weight was taken on %s", name_of(device));
      done("expert_update refuses a weight", device);
      continue;
    }
    // Tails of tokens, columns and depth; several tiles a block; every width of tiles by its own sizes.
    for (const Case& c : {Case{FERA_BF16, FERA_F32, 128, 64, 256, 3, 4, 1, false},
                          Case{FERA_BF16, FERA_BF16, 300, 320, 320, 3, 4, 3, true},
                          Case{FERA_F16, FERA_F32, 154, 72, 648, 3, 5, 2, true, 8},
                          Case{FERA_BF16, FERA_F32, 40, 1288, 40, 1, 1, 1, false},
                          Case{FERA_F16, FERA_F16, 520, 136, 192, 2, 16, 2, true},
                          Case{FERA_BF16, FERA_F32, 1040, 200, 104, 4, 5, 1, true, 16},
                          Case{FERA_BF16, FERA_F32, 2600, 64, 448, 3, 4, 1, false}})
      if (!brief() || c.tokens < 400) check(c);
    // Wide ranks, by kernels of their own and beside the product's tiles: tails of ranks, tokens and depth, tiles that
    // cross gate rows, experts that cross eights of ranks, k split over blocks, slices of tokens, one gate row and
    // many.
    for (const char* place : {"outside", "beside"}) {
      setenv("FERA_EXPERT_PLACE", place, 1);
      for (const Case& c : {Case{FERA_BF16, FERA_F32, 300, 320, 320, 3, 16, 3, true},
                            Case{FERA_F16, FERA_F32, 154, 72, 648, 4, 32, 2, true, 8},
                            Case{FERA_BF16, FERA_BF16, 256, 64, 256, 16, 7, 1, false},
                            Case{FERA_F16, FERA_F16, 520, 136, 192, 8, 64, 1, true},
                            Case{FERA_BF16, FERA_F32, 129, 1288, 1288, 2, 24, 1, false},
                            Case{FERA_F16, FERA_F32, 308, 1032, 200, 8, 64, 4, true, 16},
                            Case{FERA_BF16, FERA_F32, 1280, 40, 104, 4, 32, 20, false},
                            Case{FERA_BF16, FERA_F32, 1, 8, 8, 3, 16, 1, false},
                            Case{FERA_BF16, FERA_BF16, 2600, 64, 448, 4, 32, 2, true},
                            Case{FERA_F16, FERA_F32, 4000, 200, 136, 4, 16, 1, false}})
        if (!brief() || c.tokens < 400) check(c);
    }
    // Every width of tiles; without a wish, few tokens and many.
    for (const char* width : {"128", "160", "192", "224", "256"}) {
      setenv("FERA_EXPERT_TILE", width, 1);
      if (brief()) break;
      check({FERA_BF16, FERA_F32, 340, 456, 520, 3, 16, 2, true, 8});
      check({FERA_F16, FERA_F16, 600, 320, 264, 2, 72, 3, false});
    }
    unsetenv("FERA_EXPERT_TILE");
    unsetenv("FERA_EXPERT_PLACE");
    if (!brief()) check({FERA_BF16, FERA_F32, 2100, 136, 200, 4, 32, 1, true});
    // The sums of a gate row start at a multiple of 64 tokens: shorter gate rows are left to another variant.
    fera_expert_update_backward_args g{};
    g.experts = {128, 64, 64, 4, 32, 128, nullptr, FERA_F32, nullptr, FERA_F32, nullptr, 1.0};
    g.dy = g.x = rows;
    g.weight = f.weight;
    const std::string one = fera_expert_backward_variant(&g, device);
    g.experts.rows_per_gate = 32;
    const std::string four = fera_expert_backward_variant(&g, device);
    g.experts = {128, 64, 64, 5, 10, 128, nullptr, FERA_F32, nullptr, FERA_F32, nullptr, 1.0};
    const std::string ragged = fera_expert_backward_variant(&g, device);
    if (one != "wgmma" || !four.empty() || !ragged.empty())
      fail("variants of wide ranks: %s, %s, %s", one.c_str(), four.c_str(), ragged.c_str());
    // Every width of tiles, h made by another kernel, inside the tiles and beside them; R below and above 16; gate rows
    // of which a tile of 128 tokens meets many.
    for (const char* place : {"outside", "inside", "turns", "beside"})
      for (const char* width : {"128", "160", "192", "224", "256"}) {
        setenv("FERA_EXPERT_PLACE", place, 1);
        setenv("FERA_EXPERT_TILE", width, 1);
        if (brief()) break;
        check({FERA_BF16, FERA_F32, 300, 456, 520, 3, 4, 3, true});
        check({FERA_F16, FERA_F16, 280, 320, 264, 2, 15, 2, false, 8});
        check({FERA_BF16, FERA_F32, 340, 392, 400, 3, 4, 17, true});
        check({FERA_BF16, FERA_BF16, 308, 456, 200, 3, 1, 4, false, 8});
      }
    // By rows: blocks of one pass over dx to three, in one share of the columns to five, the last one shorter or with
    // columns past its end; depths of an odd and an even number of blocks; the last block past the last row; gate rows
    // that end inside a warp's rows, and nine of them a block.
    setenv("FERA_EXPERT_PLACE", "rows", 1);
    for (const char* columns : {"320", "640", "960"}) {
      setenv("FERA_EXPERT_TILE", columns, 1);
      for (const Case& c : {Case{FERA_BF16, FERA_F32, 340, 648, 136, 3, 4, 20, true},
                            Case{FERA_F16, FERA_F32, 154, 1288, 72, 2, 7, 2, false, 8},
                            Case{FERA_BF16, FERA_BF16, 1040, 640, 640, 3, 5, 1, true}})
        if (!brief() || c.tokens < 400) check(c);
    }
    unsetenv("FERA_EXPERT_TILE");
    for (const Case& c :
         {Case{FERA_BF16, FERA_F32, 300, 320, 320, 3, 4, 3, true},
          Case{FERA_F16, FERA_F16, 154, 72, 648, 2, 7, 2, false, 8},
          Case{FERA_BF16, FERA_BF16, 340, 648, 40, 3, 1, 17, true},
          Case{FERA_BF16, FERA_F32, 1040, 1288, 136, 4, 4, 1, false, 16},
          Case{FERA_F16, FERA_F32, 2600, 640, 640, 3, 5, 2, true}, Case{FERA_BF16, FERA_F32, 16, 8, 8, 1, 1, 1, false}})
      if (!brief() || c.tokens < 400) check(c);
    unsetenv("FERA_EXPERT_PLACE");
    // Without a wish too, where they fill the machine.
    if (!brief()) check({FERA_BF16, FERA_F32, 15232, 320, 72, 3, 4, 4, false});
    // Many shallow tiles a block, each of three pieces that two staging buffers hold in turns.
    setenv("FERA_EXPERT_TILE", "160", 1);
    for (const char* place : {"inside", "turns", "beside"}) {
      if (brief()) break;
      setenv("FERA_EXPERT_PLACE", place, 1);
      check({FERA_BF16, FERA_F32, 9000, 16, 1920, 3, 4, 1, true});
      check({FERA_BF16, FERA_F32, 9000, 1920, 16, 2, 15, 1, true});  // many tiles of tokens a slice of the sums
    }
    unsetenv("FERA_EXPERT_PLACE");
    unsetenv("FERA_EXPERT_TILE");
    done("expert_update with a weight", device);
  }
  return finish();
}
