// expert_update and its backward against triple loops in double.
#include "common/dropout.h"
#include "tests/harness.h"

using namespace test;

namespace {

struct Case {
  fera_device device;
  fera_dtype dtype, weight_dtype;
  int64_t tokens, in, out;
  int experts, rank;
  int64_t gates;
  bool in_place = false, add_to_dx = false, padded_rows = false;
  double dropout = 0;
  std::string what() const {
    char text[160];
    std::snprintf(text, sizeof text, "%s %s/%s T=%d %d->%d E=%d r=%d G=%d", name_of(device), name_of(dtype),
                  name_of(weight_dtype), static_cast<int>(tokens), static_cast<int>(in), static_cast<int>(out), experts,
                  rank, static_cast<int>(gates));
    return text;
  }
};

constexpr int64_t kSeed = (int64_t{77} << 32) + 5;
constexpr uint32_t kStream = 3;

// What dropout makes of an element: 0 or 1 / (1 - p).
double kept(const Case& c, int64_t row, int64_t column) {
  uint32_t words[4];
  fera::dropout_numbers(kSeed, kStream, static_cast<uint32_t>(row), static_cast<uint32_t>(column / 8), words);
  const uint32_t number = words[column % 8 / 2] >> column % 2 * 16 & 0xffffu;
  return number >= c.dropout * 65536 ? 1 / (1 - c.dropout) : 0;
}

// (rows, width) with gaps between rows when padded; aligned rows stay aligned.
struct Rows : Matrix {
  Rows(fera_device device, fera_dtype t, int64_t rows, int64_t columns, bool padded)
      : Matrix(device, t, rows, columns, padded ? columns % 8 == 0 ? 8 : 5 : 0) {}
};

struct Inputs {
  Values x, base, dy, a, b, gate, dx;
  double scale = 0.6;
  explicit Inputs(const Case& c)
      : x(normal(c.tokens * c.in)),
        base(normal(c.tokens * c.out)),
        dy(normal(c.tokens * c.out)),
        a(normal(int64_t{c.experts} * c.rank * c.in, 1 / std::sqrt(static_cast<double>(c.in)))),
        b(normal(int64_t{c.experts} * c.rank * c.out)),
        gate(normal(c.gates * c.experts)),
        dx(normal(c.tokens * c.in)) {}
};

struct Results {
  Rows y, dx;
  Array h, da, db, dgate;
};

Results compute(const Case& c, Inputs& in, Threads threads, bool all = true) {
  const int64_t stacked = int64_t{c.experts} * c.rank;
  Rows x(c.device, c.dtype, c.tokens, c.in, c.padded_rows), dy(c.device, c.dtype, c.tokens, c.out, c.padded_rows),
      base(c.device, c.dtype, c.tokens, c.out, c.padded_rows);
  x.set(in.x);
  dy.set(in.dy);
  base.set(in.base);
  const Array a(c.device, c.weight_dtype, in.a), b(c.device, c.weight_dtype, in.b);
  const Array gate(c.device, compute_of(c.dtype), in.gate);
  Results r{Rows(c.device, c.dtype, c.tokens, c.out, c.padded_rows),
            Rows(c.device, c.dtype, c.tokens, c.in, c.padded_rows),
            Array(c.device, c.dtype, c.tokens * stacked),
            Array(c.device, c.weight_dtype, static_cast<int64_t>(in.a.size())),
            Array(c.device, c.weight_dtype, static_cast<int64_t>(in.b.size())),
            Array(c.device, compute_of(c.dtype), static_cast<int64_t>(in.gate.size()))};
  if (c.in_place) r.y.set(in.base);
  if (c.add_to_dx) r.dx.set(in.dx);
  Buffer seed(c.device, 8);
  seed.upload(&kSeed);
  const fera_experts experts{c.tokens,    c.in,
                             c.out,       c.experts,
                             c.rank,      c.gates ? c.tokens / c.gates : 1,
                             a.data(),    c.weight_dtype,
                             b.data(),    c.weight_dtype,
                             gate.data(), in.scale,
                             c.dropout,   c.dropout > 0 ? static_cast<const int64_t*>(seed.data()) : nullptr,
                             kStream};
  const fera_expert_update_args f{experts, x.view, c.in_place ? r.y.view : base.view, r.y.view, r.h.data(),
                                  {},      nullptr};
  EXPECT_OK(FERA_RUN(expert_update, c.device, f, threads));
  fera_expert_update_backward_args back{experts,     dy.view,     x.view,      r.h.data(),     r.dx.view,
                                        c.add_to_dx, r.da.data(), r.db.data(), r.dgate.data(), {}};
  if (!all) {  // one output at a time gives the same
    const fera_expert_update_backward_args whole = back;
    back.da = back.db = back.dgate = nullptr;
    EXPECT_OK(FERA_RUN(expert_update_backward, c.device, back, threads));
    back = whole;
    back.dx.data = nullptr;
    back.db = nullptr;
    EXPECT_OK(FERA_RUN(expert_update_backward, c.device, back, threads));
    back.da = back.dgate = nullptr;
    back.db = whole.db;
  }
  EXPECT_OK(FERA_RUN(expert_update_backward, c.device, back, threads));
  return r;
}

void check(const Case& c) {
  Inputs in(c);
  const Results r = compute(c, in, Threads::two);
  const int64_t stacked = int64_t{c.experts} * c.rank, each = c.gates ? c.tokens / c.gates : 1;
  Values a = in.a, b = in.b;
  for (double& v : a) v = rounded(c.dtype, v);
  for (double& v : b) v = rounded(c.dtype, v);
  Values h(static_cast<size_t>(c.tokens * stacked)), y = in.base, dx(in.x.size(), 0.0), da(a.size(), 0.0),
                                                     db(b.size(), 0.0), dgate(in.gate.size(), 0.0);
  if (c.add_to_dx) dx = in.dx;
  Values keep(in.x.size(), 1.0);
  for (int64_t i = 0; c.dropout > 0 && i < c.tokens * c.in; ++i) keep[i] = kept(c, i / c.in, i % c.in);
  for (int64_t t = 0; t < c.tokens; ++t)
    for (int64_t i = 0; i < stacked; ++i) {
      const int64_t at_gate = t / each * c.experts + i / c.rank;
      const double factor = in.gate[at_gate] * in.scale;
      double sum = 0, dh = 0;
      for (int64_t j = 0; j < c.in; ++j) sum += in.x[t * c.in + j] * keep[t * c.in + j] * a[i * c.in + j];
      h[t * stacked + i] = sum;
      sum = rounded(c.dtype, sum);
      for (int64_t o = 0; o < c.out; ++o) {
        const double dy = in.dy[t * c.out + o];
        y[t * c.out + o] += factor * sum * b[o * stacked + i];
        dh += dy * b[o * stacked + i];
        db[o * stacked + i] += dy * factor * sum;
      }
      dgate[at_gate] += in.scale * sum * dh;
      for (int64_t j = 0; j < c.in; ++j) {
        dx[t * c.in + j] += factor * dh * a[i * c.in + j] * keep[t * c.in + j];
        da[i * c.in + j] += factor * dh * in.x[t * c.in + j] * keep[t * c.in + j];
      }
    }
  const std::string what = c.what();
  const auto tolerance = [](fera_dtype t) {
    return t == FERA_F64 ? 1e-13 : t == FERA_F32 ? 2e-6 : t == FERA_F16 ? 1e-3 : 6e-3;
  };
  const double data = tolerance(c.dtype), weights = std::max(data, tolerance(c.weight_dtype));
  // A rounded h may differ by one unit in the last place between summation orders.
  const double with_h = c.dtype == FERA_F32 || c.dtype == FERA_F64 ? data : 2 * data;
  expect_close(r.h.values(), h, data, "h " + what);
  expect_close(r.y.values(), y, data, "y " + what);
  expect_close(r.dx.values(), dx, data, "dx " + what);
  expect_close(r.da.values(), da, weights, "da " + what);
  expect_close(r.db.values(), db, std::max(weights, with_h), "db " + what);
  // Each share is a sum of terms of both signs: the tolerance is of their size.
  expect_close(r.dgate.values(), dgate, with_h, "dgate " + what,
               with_h * 2 * std::sqrt(static_cast<double>(stacked * c.tokens)));
}

void shapes(fera_device device) {
  struct Shape {
    int64_t tokens, in, out;
    int experts, rank;
    int64_t gates;
  };
  const Shape kShapes[] = {{96, 64, 48, 3, 4, 2},
                           {1, 5, 7, 1, 1, 1},
                           {50, 33, 65, 3, 5, 5},
                           {100, 300, 20, 4, 32, 4},
                           {7, 64, 31, 2, 17, 7},
                           {0, 8, 8, 2, 2, 0},
                           {60, 40, 32, 8, 64, 1},
                           {13, 40, 24, 1, 16, 1},
                           {300, 17, 1, 5, 3, 10},
                           {33, 1, 19, 32, 1, 3},
                           {270, 31, 33, 1, 33, 1},
                           // Aligned widths and small ranks, for the tensor cores: tails of tokens and columns, one
                           // gate row and many, several blocks of columns, masters of both dtypes.
                           {64, 64, 64, 3, 4, 1},
                           {300, 320, 200, 3, 4, 3},
                           {154, 72, 648, 3, 5, 2},
                           {77, 1288, 40, 1, 1, 1},
                           {96, 136, 1032, 2, 16, 6},
                           {1000, 40, 104, 1, 16, 4},
                           {33, 8, 8, 4, 6, 1}};
  int turn = 0;
  for (const Shape& s : kShapes)
    for (const fera_dtype t : kDtypes)
      for (const fera_dtype w : {FERA_F32, t}) {
        if (t == FERA_F64 && w == FERA_F32) continue;
        const Case c{device,    t,      w,       s.tokens,      s.in,          s.out,
                     s.experts, s.rank, s.gates, turn % 2 == 0, turn % 3 == 0, turn % 4 < 2};
        ++turn;
        check(c);
      }
  done("expert_update shapes, dtypes, strides", device);
}

// The ways in which the tensor core kernels share out tokens and columns, on large devices and small.
void cuts(fera_device device) {
  struct Shape {
    int64_t tokens, in, out;
    int experts, rank;
    int64_t gates;
  };
  const Shape kShapes[] = {{9000, 64, 72, 3, 4, 1},     // tiles of 128 tokens, one each
                           {17000, 72, 40, 3, 4, 4},    // h: several tiles a block
                           {40000, 16, 24, 3, 4, 5},    // several tiles a slice
                           {8191, 40, 24, 1, 12, 1},    // a prime number of tokens
                           {5000, 136, 136, 5, 3, 2},   // an odd number of ranks
                           {40, 6800, 24, 1, 12, 1},    // A in panels
                           {4240, 3080, 8, 1, 17, 1},   // A in panels, R > 16
                           {4400, 24, 2440, 3, 4, 1},   // column blocks, several tiles a slice
                           {1000, 264, 3080, 4, 8, 1},  // many column blocks, R = 32
                           {3000, 1288, 648, 1, 1, 1}, {308, 2048, 1280, 3, 4, 4}, {2560, 648, 200, 2, 16, 1},
                           {700, 640, 1288, 3, 5, 7},  {510, 104, 328, 1, 16, 30}, {960, 72, 1296, 3, 4, 60},
                           {130, 8, 8, 1, 32, 1},      {527, 200, 88, 31, 1, 17},  {16, 3072, 3072, 3, 4, 1}};
  int turn = 0;
  for (const Shape& s : kShapes) {
    const fera_dtype t = turn % 2 == 0 ? FERA_BF16 : FERA_F16, w = turn / 2 % 2 == 0 ? FERA_F32 : t;
    check(
        {device, t, w, s.tokens, s.in, s.out, s.experts, s.rank, s.gates, turn % 2 == 1, turn % 3 == 0, turn % 4 < 2});
    ++turn;
  }
  done("expert_update cuts", device);
}

void bits(fera_device device) {
  // The third is narrow and deep: the packed operands' panels are at their narrowest, several chunks each. The last
  // two are for the tensor cores.
  const Case kCases[] = {{device, FERA_F32, FERA_F32, 430, 70, 90, 3, 4, 2},
                         {device, FERA_BF16, FERA_F32, 430, 70, 90, 3, 4, 2},
                         {device, FERA_F64, FERA_F64, 9, 700, 2, 1, 2, 1},
                         {device, FERA_BF16, FERA_F32, 600, 320, 328, 3, 4, 3},
                         {device, FERA_F16, FERA_F32, 1600, 136, 648, 3, 7, 100},
                         {device, FERA_F32, FERA_F32, 430, 70, 90, 3, 4, 2, false, false, false, 0.25},
                         {device, FERA_BF16, FERA_F32, 600, 320, 328, 3, 4, 3, false, true, false, 0.25}};
  for (const Case& c : kCases) {
    Inputs in(c);
    const Results first = compute(c, in, Threads::none);
    for (const Threads threads : {Threads::none, Threads::reversed, Threads::two, Threads::many})
      for (const bool all : {true, false}) {
        const Results again = compute(c, in, threads, all);
        expect_same_bits(first.y.buffer, again.y.buffer, "y " + c.what());
        expect_same_bits(first.dx.buffer, again.dx.buffer, "dx " + c.what());
        expect_same_bits(first.da.buffer, again.da.buffer, "da " + c.what());
        expect_same_bits(first.db.buffer, again.db.buffer, "db " + c.what());
        expect_same_bits(first.dgate.buffer, again.dgate.buffer, "dgate " + c.what());
      }
  }
  done("expert_update same bits", device);
}

// Every way of taking x and of writing dx: columns that eight does not divide, panels of all widths, tails of tokens.
void dropout(fera_device device) {
  // Known answers of Philox4x32-10 (Random123's kat_vectors): the counter is (group, row, stream, 0).
  uint32_t words[4];
  fera::dropout_numbers(0, 0, 0, 0, words);
  if (words[0] != 0x6627e8d5u || words[1] != 0xe169c58du || words[2] != 0xbc57ac4cu || words[3] != 0x9b00dbd8u)
    fail("Philox4x32-10 of zeros is another");
  struct Shape {
    int64_t tokens, in, out;
    int experts, rank;
    int64_t gates;
  };
  const Shape kShapes[] = {{96, 64, 48, 3, 4, 2},     {50, 33, 65, 3, 5, 5},      {1, 5, 7, 1, 1, 1},
                           {100, 300, 20, 4, 32, 4},  {60, 40, 32, 8, 64, 1},     {0, 8, 8, 2, 2, 0},
                           {270, 31, 33, 1, 33, 1},   {300, 328, 200, 3, 4, 3},   {154, 72, 648, 3, 5, 2},
                           {96, 136, 1032, 2, 16, 6}, {1200, 1288, 40, 1, 12, 4}, {40, 6800, 24, 1, 17, 1}};
  int turn = 0;
  for (const Shape& s : kShapes)
    for (const fera_dtype t : kDtypes) {
      const fera_dtype w = turn % 2 == 0 || t == FERA_F64 ? t : FERA_F32;
      const Case c{device,
                   t,
                   w,
                   s.tokens,
                   s.in,
                   s.out,
                   s.experts,
                   s.rank,
                   s.gates,
                   turn % 2 == 0,
                   turn % 3 == 0,
                   turn % 4 < 2,
                   turn % 5 == 0 ? 0.75 : 0.125};
      ++turn;
      check(c);
    }
  done("expert_update dropout", device);
}

// The mask by itself, and added to what is there.
void expert_dropout(fera_device device) {
  for (const fera_dtype t : kDtypes) {
    Case c{device, t, t, 37, 27, 1, 1, 1, 1};
    c.dropout = 0.5;  // what is kept is doubled, exactly
    Values from = normal(c.tokens * c.in), to = normal(c.tokens * c.in);
    Rows x(device, t, c.tokens, c.in, true), y(device, t, c.tokens, c.in, false);
    x.set(from);
    Buffer seed(device, 8);
    seed.upload(&kSeed);
    for (const int add : {0, 1}) {
      y.set(to);
      const fera_expert_dropout_args args{
          c.tokens, c.in, x.view, y.view, add, c.dropout, static_cast<const int64_t*>(seed.data()), kStream};
      EXPECT_OK(FERA_RUN(expert_dropout, device, args, Threads::many));
      const Values got = y.values();
      for (int64_t i = 0; i < c.tokens * c.in; ++i) {
        const double want = from[i] * kept(c, i / c.in, i % c.in) + (add ? to[i] : 0);
        if (std::abs(got[i] - rounded(t, want)) > (t == FERA_F32 ? 1e-6 : 0)) fail("expert_dropout of %s", name_of(t));
      }
    }
  }
  done("expert_dropout", device);
}

void nan_stays(fera_device device) {
  const Case c{device, FERA_F32, FERA_F32, 20, 16, 24, 3, 4, 2};
  Inputs in(c);
  in.x[3 * 16 + 5] = NAN;
  const Results r = compute(c, in, Threads::none);
  const Values y = r.y.values();
  expect_all_nan(Values(y.begin() + 3 * 24, y.begin() + 4 * 24), "y of a NaN row");
  for (int i = 0; i < 3 * 24; ++i)
    if (!std::isfinite(y[i])) fail("a NaN spread to another token");
  done("expert_update NaN", device);
}

void errors(fera_device device) {
  const Rows x(device, FERA_F32, 4, 8, false), y(device, FERA_F32, 4, 8, false);
  const Array a(device, FERA_F32, 64), gate(device, FERA_F32, 8), h(device, FERA_F32, 64);
  const fera_experts experts{4, 8, 8, 2, 2, 2, a.data(), FERA_F32, a.data(), FERA_F32, gate.data(), 1.0};
  const fera_expert_update_args good{experts, x.view, y.view, y.view, h.data(), {}, nullptr};
  fera_expert_update_args e = good;
  e.experts.rank = 300;
  expect_error(FERA_RUN(expert_update, device, e), FERA_INVALID,
               "expert_update: experts * rank must be from 1 to 512, got 600");
  e = good;
  e.experts.rows_per_gate = 3;
  expect_error(FERA_RUN(expert_update, device, e), FERA_INVALID,
               "expert_update: tokens must be a multiple of rows_per_gate 3, got 4");
  e = good;
  e.base.dtype = FERA_BF16;
  expect_error(FERA_RUN(expert_update, device, e), FERA_INVALID,
               "expert_update: base.dtype must be the dtype of x, got 2");
  e = good;
  e.y.stride = 7;
  expect_error(FERA_RUN(expert_update, device, e), FERA_INVALID, "expert_update: y.stride must be at least 8, got 7");
  e = good;
  e.experts.dropout = 1;
  expect_error(FERA_RUN(expert_update, device, e), FERA_INVALID, "expert_update: dropout must be in [0, 1), got 1");
  e.experts.dropout = 0.5;
  expect_error(FERA_RUN(expert_update, device, e), FERA_INVALID,
               "expert_update: seed must be a pointer with dropout, got NULL");
  e.experts.dropout = 0;
  e.experts.seed = static_cast<const int64_t*>(gate.data());
  expect_error(FERA_RUN(expert_update, device, e), FERA_INVALID,
               "expert_update: seed must be NULL without dropout, got a pointer");
  if (device == FERA_CUDA) {
    e.experts.dropout = 0.5;
    e.weight = x.view;
    expect_error(FERA_RUN(expert_update, device, e), FERA_INVALID,
                 "expert_update: weight must be NULL where dropout is asked for, got a pointer");
  }
  done("expert_update errors", device);
}

}  // namespace

int main() {
  for (const fera_device device : devices()) {
    shapes(device);
    if (device == FERA_CUDA) cuts(device);
    dropout(device);
    expert_dropout(device);
    bits(device);
    nan_stays(device);
    errors(device);
  }
  return finish();
}
