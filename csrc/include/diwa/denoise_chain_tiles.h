#pragma once
// Tiling of the denoising chain over a thread-block cluster. Shared by the CUDA kernel and by the
// host-side model that tests it, so both use the same indices. No CUDA header.
//
// A cluster of W / 64 blocks takes M rows through all steps. Block `rank` owns the 64 features
// [64 rank, 64 rank + 64) of every hidden layer and keeps their weights in its shared memory; warp
// w of four owns 16 of them. The activations of a layer are written into every block of the
// cluster.
#ifdef __CUDACC__
#define DIWA_HD __host__ __device__ __forceinline__ constexpr
#else
#define DIWA_HD inline constexpr
#endif

namespace diwa::chain_tiles {

constexpr int kSlice = 64;         // features of a block
constexpr int kWarps = 4;          // of a block
constexpr int kThreads = 128;      // of a block
constexpr int kWarpFeatures = 16;  // features of a warp: two mma tiles
constexpr int kChunk = 32;         // numbers of an action chunk, rounded up; P is at most that
constexpr int kTable = 7;          // p, q, c1, c2, std, std / s, log s + log(2 pi) / 2

// Leading dimensions of bfloat16 matrices: an odd number of 16-byte units, so that the eight rows
// that ldmatrix reads at a time lie in different banks.
constexpr int kLdX = kChunk + 8;
constexpr int kLdOut = kSlice + 8;

template <int W, int M>
struct Layout {
  static constexpr int kCluster = W / kSlice;
  static constexpr int kRowTiles = M / 16;
  static constexpr int kItems = M * (kChunk / 4) / kThreads;  // groups of four numbers per thread
  static constexpr int kLd = W + 8;
  // bytes from the start of shared memory
  static constexpr int kHidden1 = 0;                            // [64, kLd] bfloat16
  static constexpr int kHidden2 = kHidden1 + kSlice * kLd * 2;  // [64, kLd]
  static constexpr int kAct1 = kHidden2 + kSlice * kLd * 2;     // [M, kLd]
  static constexpr int kAct2 = kAct1 + M * kLd * 2;             // [M, kLd]
  static constexpr int kX = kAct2 + M * kLd * 2;                // [M, kLdX]
  static constexpr int kIn = kX + M * kLdX * 2;                 // [64, kLdX]
  static constexpr int kOut = kIn + kSlice * kLdX * 2;          // [kChunk, kLdOut]
  static constexpr int kSum = kOut + kChunk * kLdOut * 2;       // [M, kChunk] float32
  static constexpr int kBytes = kSum + M * kChunk * 4;
  // The partial sums of the four warps, [4, M, kChunk] float32, lie where the first activations
  // were: those are read before the second barrier of a step and written after the third.
  static constexpr int kPartial = kAct1;
  static_assert(W % kSlice == 0 && kCluster <= 8, "portable clusters have at most 8 blocks");
  static_assert(kWarps * M * kChunk * 4 <= M * kLd * 2, "partial sums exceed the activations");
  static_assert(kItems >= 1 && M * (kChunk / 4) % kThreads == 0, "items must fill the block");
};

// Row and column of the 8-value row whose address a lane gives to ldmatrix.x4.
// First operand, 16 rows by 16 inputs.
DIWA_HD int a_row(int lane) { return lane & 15; }
DIWA_HD int a_col(int lane) { return 8 * (lane >> 4); }
// Second operand, 16 features by 16 inputs: two mma tiles of 8 features, registers 0-1 and 2-3.
DIWA_HD int b_row(int lane) { return 8 * (lane >> 4) + (lane & 7); }
DIWA_HD int b_col(int lane) { return 8 * ((lane >> 3) & 1); }
// Place of accumulator i of a lane in a tile of 16 rows by 8 features.
DIWA_HD int c_row(int lane, int i) { return (lane >> 2) + 8 * (i >> 1); }
DIWA_HD int c_col(int lane, int i) { return 2 * (lane & 3) + (i & 1); }
// The 16-byte piece of a warp's 16 features that a lane copies to the other blocks, first pass.
DIWA_HD int copy_row(int lane) { return lane >> 1; }
DIWA_HD int copy_col(int lane) { return 8 * (lane & 1); }
// Place of a number in a float32 matrix of kChunk columns; the swizzle keeps groups of four.
DIWA_HD int sum_index(int row, int col) { return row * kChunk + (col ^ ((row & 7) << 2)); }
// The block of the cluster that writes a row's results.
DIWA_HD int writer(int row, int cluster) { return row % cluster; }

}  // namespace diwa::chain_tiles
