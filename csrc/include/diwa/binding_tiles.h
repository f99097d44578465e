#pragma once
// For the bindings of operators whose rows are independent from the first GEMM to the last.
#include <memory>
#include <new>

#include "diwa/binding.h"

namespace diwa {

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
};

// body(row0, row1, scratch) over [0, rows) in one parallel region. A tile has at most Tile rows,
// whose activations fit the second-level cache, and a thread gets at least Grain rows; scratch
// holds floats(rows of the tile) values.
template <int64_t Tile, int64_t Grain, class Floats, class Body>
void for_tiles(int64_t rows, const Floats& floats, const Body& body) {
  const auto share = [&](int64_t begin, int64_t end) {
    const int64_t n = end - begin, tiles = (n + Tile - 1) / Tile, most = (n + tiles - 1) / tiles;
    const size_t bytes = sizeof(float) * floats(most);
    const std::unique_ptr<float, AlignedDelete> scratch(
        static_cast<float*>(::operator new(bytes, std::align_val_t(64))));
    for (int64_t i = 0; i < tiles; ++i)
      body(begin + n * i / tiles, begin + n * (i + 1) / tiles, scratch.get());
  };
  if (rows > Grain) {
    torch::stable::parallel_for(0, rows, Grain, share);
  } else if (rows > 0) {
    share(0, rows);
  }
}

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  if (t.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t i = 0;
  for (const int64_t n : shape)
    if (t.size(i++) != n) return false;
  return true;
}

}  // namespace diwa
