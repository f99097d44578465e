// Host-side model of csrc/cuda/denoise_chain.cu: the same tiles, indices and stages on plain
// arrays, one lane after another, with the matrix instructions as PTX defines them. It records who
// touched which cell of a block's shared memory between which barriers, and counts the accesses of
// two warps to one cell, at least one of them a write, that no barrier separates.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "diwa/denoise_chain_tiles.h"

using namespace diwa::chain_tiles;

namespace {

float widen(uint16_t h) {
  const uint32_t u = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

uint16_t round_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if (f != f) return 0x7fff;
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

float mish(float x) {
  const float e = std::exp(x > 20.f ? 20.f : x), n = e * (e + 2.f);
  return x * (n / (n + 2.f));
}

float clamp(float x, float low, float high) {
  x = x > high ? high : x;
  return x < low ? low : x;
}

}  // namespace

extern "C" struct ModelNetwork {
  const uint16_t *chunk_in, *hidden1, *hidden2, *out;  // bfloat16
  const float *time, *bias1, *bias2, *out_bias, *cond;
};

extern "C" struct ModelArgs {
  ModelNetwork net[2];
  const float *noise, *table;
  float *chunk, *chain, *log_prob;
  int64_t N;
  int P, K, base_steps, ft_steps;
  float clip_noise;
  int without;  // barrier that is left out: 1 to 3 of the cluster, 4 and 5 of the block; 0 none
};

namespace {

struct Actor {
  int block, warp;
};
template <int W, int M>
struct Model {
  using L = Layout<W, M>;
  using Tile = float[32][L::kRowTiles][2][4];
  static constexpr int kActors = L::kCluster * kWarps;
  static constexpr int kCells = (L::kBytes - L::kAct1) / 2;  // the weights need no watching

  struct Item {
    int row, col;
    bool used;
    float x[4], noise[4];
  };
  struct Cell {
    int writer = -1;
    uint32_t written = 0, read[kActors] = {};
  };

  const ModelArgs& a;
  std::vector<std::vector<unsigned char>> memory;
  std::vector<std::vector<Cell>> cells;
  uint32_t cluster_epoch = 1, block_epoch[L::kCluster];
  int64_t races = 0;

  explicit Model(const ModelArgs& args)
      : a(args),
        memory(L::kCluster, std::vector<unsigned char>(L::kBytes)),
        cells(L::kCluster, std::vector<Cell>(kCells)) {
    for (auto& e : block_epoch) e = 1;
  }

  uint32_t stamp(Actor who) const { return cluster_epoch << 16 | block_epoch[who.block]; }
  bool ordered(Actor who, int other, uint32_t then) const {
    if (then == 0 || other == who.block * kWarps + who.warp) return true;
    return other / kWarps == who.block ? then != stamp(who) : then >> 16 != cluster_epoch;
  }
  void touch(int block, Actor who, int offset, int bytes, bool write) {
    if (offset < L::kAct1) return;
    for (int i = (offset - L::kAct1) / 2; i < (offset - L::kAct1 + bytes) / 2; ++i) {
      Cell& c = cells[block][i];
      if (c.writer >= 0) races += !ordered(who, c.writer, c.written);
      const int me = who.block * kWarps + who.warp;
      if (write) {
        for (int other = 0; other < kActors; ++other) races += !ordered(who, other, c.read[other]);
        c.writer = me, c.written = stamp(who);
      } else {
        c.read[me] = stamp(who);
      }
    }
  }
  template <class T>
  T get(int block, Actor who, int offset) {
    T v;
    touch(block, who, offset, sizeof(T), false);
    std::memcpy(&v, &memory[block][offset], sizeof(T));
    return v;
  }
  template <class T>
  void put(int block, Actor who, int offset, T v) {
    touch(block, who, offset, sizeof(T), true);
    std::memcpy(&memory[block][offset], &v, sizeof(T));
  }
  void barrier(int which, bool of_cluster) {
    if (which && which == a.without) return;
    cluster_epoch += of_cluster;
    for (auto& e : block_epoch) ++e;
  }
  void cluster_barrier(int which) { barrier(which, true); }
  void block_barrier(int which) { barrier(which, false); }

  // ldmatrix.x4: lanes 8 m to 8 m + 7 address the rows of matrix m; lane l receives row l / 4,
  // columns 2 (l % 4) and the next, of every matrix.
  void load_matrices(uint16_t (&r)[32][4][2], Actor who, const int (&address)[32]) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m)
        for (int i = 0; i < 2; ++i) {
          const int at = address[8 * m + lane / 4] + (2 * (lane % 4) + i) * 2;
          r[lane][m][i] = get<uint16_t>(who.block, who, at);
        }
  }
  // mma.m16n8k16: of the first operand a lane holds rows l / 4 and 8 more, columns 2 (l % 4) and 8
  // more; of the second the same inputs of feature l / 4.
  template <class C>
  void mma(const C& accumulators, const uint16_t (&ra)[32][4][2], const uint16_t (&rb)[32][2][2]) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 2; ++i) {
        const int g = lane / 4, t = 2 * (lane % 4) + i;
        for (int m = 0; m < 4; ++m) A[g + 8 * (m % 2)][t + 8 * (m / 2)] = widen(ra[lane][m][i]);
        for (int m = 0; m < 2; ++m) B[t + 8 * m][g] = widen(rb[lane][m][i]);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) {
        float sum = 0;
        const int row = lane / 4 + 8 * (e / 2), col = 2 * (lane % 4) + e % 2;
        for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][col];
        accumulators(lane)[e] += sum;
      }
  }

  void load_network(Actor who, const ModelNetwork& net) {
    const int rank = who.block;
    for (int lane = 0; lane < 32; ++lane) {
      const int thread = who.warp * 32 + lane;
      for (int i = thread; i < kSlice * W; i += kThreads) {
        const int to = (i / W * L::kLd + i % W) * 2;
        put(rank, who, L::kHidden1 + to, net.hidden1[rank * kSlice * W + i]);
        put(rank, who, L::kHidden2 + to, net.hidden2[rank * kSlice * W + i]);
      }
      for (int i = thread; i < a.P * kSlice; i += kThreads) {
        const int row = i / kSlice, col = i % kSlice;
        put(rank, who, L::kOut + (row * kLdOut + col) * 2, net.out[row * W + rank * kSlice + col]);
      }
      for (int i = thread; i < kSlice * a.P; i += kThreads)
        put(rank, who, L::kIn + (i / a.P * kLdX + i % a.P) * 2,
            net.chunk_in[rank * kSlice * a.P + i]);
    }
  }

  void multiply(Tile& c, Actor who, int inputs, int ld, int act, int w) {
    static Tile odd;
    std::memset(odd, 0, sizeof odd);
    for (int k = 0; k < inputs; k += 32)
      for (int half = 0; half < 2; ++half) {
        uint16_t rb[32][4][2], ra[32][4][2], pair[32][2][2];
        int address[32];
        for (int lane = 0; lane < 32; ++lane)
          address[lane] =
              w + ((who.warp * kWarpFeatures + b_row(lane)) * ld + b_col(lane) + k + 16 * half) * 2;
        load_matrices(rb, who, address);
        for (int i = 0; i < L::kRowTiles; ++i) {
          for (int lane = 0; lane < 32; ++lane)
            address[lane] = act + ((a_row(lane) + 16 * i) * ld + a_col(lane) + k + 16 * half) * 2;
          load_matrices(ra, who, address);
          for (int j = 0; j < 2; ++j) {
            for (int lane = 0; lane < 32; ++lane)
              std::memcpy(pair[lane], rb[lane][2 * j], sizeof pair[lane]);
            mma([&](int lane) { return half ? odd[lane][i][j] : c[lane][i][j]; }, ra, pair);
          }
        }
      }
    float *to = &c[0][0][0][0], *from = &odd[0][0][0][0];
    for (size_t i = 0; i < sizeof odd / sizeof *to; ++i) to[i] += from[i];
  }

  void publish(const Tile& c, Actor who, int act) {
    const int col0 = who.block * kSlice + who.warp * kWarpFeatures;
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < L::kRowTiles; ++i)
        for (int j = 0; j < 2; ++j)
          for (int e = 0; e < 4; ++e) {
            const int at = (16 * i + c_row(lane, e)) * L::kLd + col0 + 8 * j + c_col(lane, e);
            put(who.block, who, act + at * 2, round_bf16(mish(c[lane][i][j][e])));
          }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < L::kRowTiles; ++i)
        for (int peer = 1; peer < L::kCluster; ++peer)
          for (int n = 0; n < 8; ++n) {
            const int at = (16 * i + copy_row(lane)) * L::kLd + col0 + copy_col(lane) + n;
            const auto v = get<uint16_t>(who.block, who, act + at * 2);
            put((who.block + peer) % L::kCluster, who, act + at * 2, v);
          }
  }

  void output(const Tile& y, Actor who) {
    uint16_t rb[2][32][4][2], ra[32][4][2], pair[32][2][2];
    for (int n = 0; n < 2; ++n) {
      int address[32];
      for (int lane = 0; lane < 32; ++lane)
        address[lane] =
            L::kOut +
            ((b_row(lane) + 16 * n) * kLdOut + who.warp * kWarpFeatures + b_col(lane)) * 2;
      load_matrices(rb[n], who, address);
    }
    for (int i = 0; i < L::kRowTiles; ++i) {
      for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < 4; ++m)
          for (int n = 0; n < 2; ++n) ra[lane][m][n] = round_bf16(y[lane][i][m / 2][m % 2 * 2 + n]);
      for (int j = 0; j < kChunk / 8; ++j) {
        static float c[32][4];
        std::memset(c, 0, sizeof c);
        for (int lane = 0; lane < 32; ++lane)
          std::memcpy(pair[lane], rb[j / 2][lane][j % 2 * 2], sizeof pair[lane]);
        mma([&](int lane) { return c[lane]; }, ra, pair);
        for (int lane = 0; lane < 32; ++lane)
          for (int e = 0; e < 4; ++e) {
            const int at = sum_index(16 * i + c_row(lane, e), 8 * j + c_col(lane, e));
            put(who.block, who, L::kPartial + (who.warp * M * kChunk + at) * 4, c[lane][e]);
          }
      }
    }
  }

  template <class F>
  void each_warp(const F& f) {
    for (int block = 0; block < L::kCluster; ++block)
      for (int warp = 0; warp < kWarps; ++warp) f(Actor{block, warp});
  }

  void cluster(int64_t row0) {
    const int quads = a.P / 4;
    struct Warp {
      Tile cond, y, h;
      Item item[32][L::kItems];
    };
    std::vector<Warp> warps(kActors);
    const auto of = [&](Actor who) -> Warp& { return warps[who.block * kWarps + who.warp]; };
    for (auto& m : memory) std::memset(m.data() + L::kX, 0, L::kSum - L::kX);
    each_warp([&](Actor who) {
      for (int lane = 0; lane < 32; ++lane)
        for (int j = 0; j < L::kItems; ++j) {
          Item& m = of(who).item[lane][j];
          const int at = who.warp * 32 + lane + j * kThreads;
          m.row = at / quads, m.col = at % quads * 4;
          m.used = at < M * quads && row0 + m.row < a.N;
          for (int i = 0; i < 4; ++i) {
            m.x[i] = m.used ? a.noise[(row0 + m.row) * a.P + m.col + i] : 0.f;
            if (m.used)
              put(who.block, who, L::kX + (m.row * kLdX + m.col + i) * 2, round_bf16(m.x[i]));
          }
        }
    });
    cluster_barrier(0);
    for (int s = 0; s < a.K; ++s) step(s, row0, of);
    cluster_barrier(0);
  }

  template <class Of>
  void step(int s, int64_t row0, const Of& of) {
    const int t = a.K - 1 - s;
    const ModelNetwork& net = a.net[s >= a.base_steps];
    if (s == 0 || s == a.base_steps) {
      each_warp([&](Actor who) { load_network(who, net); });
      block_barrier(0);
    }
    each_warp([&](Actor who) {
      auto& w = of(who);
      const int feature = who.block * kSlice + who.warp * kWarpFeatures;
      for (int lane = 0; lane < 32; ++lane) {
        for (int j = 0; j < L::kItems; ++j) {
          Item& m = w.item[lane][j];
          for (int i = 0; i < 4 && m.used; ++i) {
            if (t == a.ft_steps - 1 && writer(m.row, L::kCluster) == who.block)
              a.chain[(row0 + m.row) * (a.ft_steps + 1) * a.P + m.col + i] = m.x[i];
            m.noise[i] = a.noise[((s + 1) * a.N + row0 + m.row) * a.P + m.col + i];
          }
        }
        for (int i = 0; i < L::kRowTiles; ++i)
          for (int j = 0; j < 2; ++j)
            for (int e = 0; e < 4; ++e) {
              const int64_t row = row0 + 16 * i + c_row(lane, e);
              const int f = feature + 8 * j + c_col(lane, e);
              w.cond[lane][i][j][e] = row < a.N ? net.cond[row * W + f] : 0.f;
              w.y[lane][i][j][e] = w.cond[lane][i][j][e] + net.time[t * W + f];
              w.h[lane][i][j][e] = net.bias1[f];
            }
      }
      multiply(w.y, who, kChunk, kLdX, L::kX, L::kIn);
      publish(w.y, who, L::kAct1);
    });
    cluster_barrier(1);
    each_warp([&](Actor who) {
      multiply(of(who).h, who, W, L::kLd, L::kAct1, L::kHidden1);
      publish(of(who).h, who, L::kAct2);
    });
    cluster_barrier(2);
    each_warp([&](Actor who) {
      auto& y = of(who).y;
      const int feature = who.block * kSlice + who.warp * kWarpFeatures;
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < L::kRowTiles; ++i)
          for (int j = 0; j < 2; ++j)
            for (int e = 0; e < 4; ++e)
              y[lane][i][j][e] += net.bias2[feature + 8 * j + c_col(lane, e)];
      multiply(y, who, W, L::kLd, L::kAct2, L::kHidden2);
      output(y, who);
    });
    block_barrier(4);
    each_warp([&](Actor who) {
      for (auto& items : of(who).item)
        for (Item& m : items)
          for (int i = 0; i < 4 && m.used; ++i) {
            const int at = sum_index(m.row, m.col) + i;
            float total = 0;
            for (int w = 0; w < kWarps; ++w)
              total += get<float>(who.block, who, L::kPartial + (w * M * kChunk + at) * 4);
            put(who.block, who, L::kSum + at * 4, total);
          }
    });
    cluster_barrier(3);
    each_warp([&](Actor who) {
      for (auto& items : of(who).item)
        for (Item& m : items)
          if (m.used) advance(m, who, net, t, row0);
    });
    block_barrier(5);
  }

  void advance(Item& m, Actor who, const ModelNetwork& net, int t, int64_t row0) {
    const float* c = a.table + t * kTable;
    for (int i = 0; i < 4; ++i) {
      float eps = net.out_bias[m.col + i];
      for (int r = 0; r < L::kCluster; ++r)
        eps += get<float>(r, who, L::kSum + (sum_index(m.row, m.col) + i) * 4);
      const float n = clamp(m.noise[i], -a.clip_noise, a.clip_noise);
      const float x0 = clamp(c[0] * m.x[i] - c[1] * eps, -1.f, 1.f);
      m.x[i] = c[2] * x0 + c[3] * m.x[i] + c[4] * n;
      put(who.block, who, L::kX + (m.row * kLdX + m.col + i) * 2, round_bf16(m.x[i]));
      if (writer(m.row, L::kCluster) != who.block) continue;
      const int64_t row = row0 + m.row, j = a.ft_steps - 1 - t, col = m.col + i;
      if (t < a.ft_steps) {
        a.chain[(row * (a.ft_steps + 1) + j + 1) * a.P + col] = m.x[i];
        a.log_prob[(row * a.ft_steps + j) * a.P + col] = -0.5f * (c[5] * n) * (c[5] * n) - c[6];
      }
      if (t == 0) a.chunk[row * a.P + col] = m.x[i];
    }
  }
};

template <int W, int M>
int64_t run(const ModelArgs& args) {
  int64_t races = 0;
  for (int64_t row0 = 0; row0 < args.N; row0 += M) {
    Model<W, M> model(args);
    model.cluster(row0);
    races += model.races;
  }
  return races;
}

}  // namespace

// Number of unordered accesses, or -1 for sizes without a kernel.
extern "C" int64_t denoise_chain_model(const ModelArgs* args, int W, int M) {
  if (W == 256 && M == 16) return run<256, 16>(*args);
  if (W == 256 && M == 32) return run<256, 32>(*args);
  if (W == 512 && M == 16) return run<512, 16>(*args);
  if (W == 512 && M == 32) return run<512, 32>(*args);
  return -1;
}
