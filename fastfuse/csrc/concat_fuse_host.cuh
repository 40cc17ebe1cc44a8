// What the launchers of concat_fuse's first part share: the description of a call, and how its maps are walked through.
#pragma once

#include "concat_fuse.cuh"

namespace fastfuse {

// How the maps of a call are walked through.
struct Way {
  bool last;   // all are channels-last
  bool pairs;  // channels can be taken two at a time
  bool staged;
};

// The description that all launches of a call share. `parameters`: 3x3 weights, weight and bias of each module;
// `statistics`: mean and var of each; `options`: momentum and eps of each.
inline Call describe(
    const std::vector<Tensor>& features, const std::vector<int64_t>& counts, const std::vector<Tensor>& parameters,
    const std::vector<Tensor>& statistics, bool training, const std::vector<double>& options,
    const std::vector<Tensor>& hidden) {
  STD_TORCH_CHECK(features.size() <= MOST_MAPS && counts.size() <= MOST_MODULES, "at most ", MOST_MAPS, " maps of ",
                  MOST_MODULES, " modules share a launch");
  Call call{};
  const Tensor& x = features[0];
  call.batch = static_cast<int32_t>(x.size(0));
  call.height = static_cast<int32_t>(x.size(2));
  call.width = static_cast<int32_t>(x.size(3));
  const int64_t positions = x.size(0) * x.size(2) * x.size(3);
  // As fastfuse/kernels/_limits.py has it: the last share and the last step of a loop reach beyond the positions.
  STD_TORCH_CHECK(positions <= (int64_t{1} << 31) - (int64_t{1} << 24), "a channel has at most 2^31 - 2^24 values");
  const int64_t share = (positions + SHARES - 1) / SHARES;
  call.chunk = static_cast<int32_t>(share > LEAST ? share : LEAST);
  call.shares = static_cast<int32_t>(blocks(positions, call.chunk));
  call.training = training;
  for (size_t m = 0, s = 0; m < counts.size(); ++m) {
    Module& module = call.module[m];
    const Tensor& taps = parameters[3 * m];
    module.taps = vector_of(taps);
    module.tap_c = taps.stride(0);
    module.tap_i = taps.stride(2);
    module.tap_j = taps.stride(3);
    module.weight = vector_of(parameters[3 * m + 1]);
    module.bias = vector_of(parameters[3 * m + 2]);
    module.mean = vector_of(statistics[2 * m]);
    module.var = vector_of(statistics[2 * m + 1]);
    module.momentum = static_cast<float>(options[2 * m]);
    module.eps = static_cast<float>(options[2 * m + 1]);
    module.hidden = map_of(hidden[m]);
    module.channels = module.hidden.channels;
    int32_t inner = 0;
    for (int64_t i = 0; i < counts[m]; ++i, ++s) {
      Source& source = call.source[s];
      source.map = map_of(features[s]);
      source.module = static_cast<int32_t>(m);
      source.inner = inner;
      source.first = call.channels;
      inner += source.map.channels;
      call.channels += source.map.channels;
    }
    call.maps = static_cast<int32_t>(s);
  }
  return call;
}

inline bool in_pairs(const Map& map) {
  return map.channel == 1 && map.channels % 2 == 0 && map.position % 2 == 0 && map.sample % 2 == 0 &&
         reinterpret_cast<uintptr_t>(map.data) % 4 == 0;
}

// Chooses the way and numbers the tiles of channels for it.
inline Way way_of(Call& call, int buffers) {
  Way way{true, call.source[0].map.type != 0, false};
  for (int s = 0; s < call.maps; ++s) {
    const Source& source = call.source[s];
    const Map& hidden = call.module[source.module].hidden;
    way.last = way.last && source.map.last;
    way.pairs = way.pairs && in_pairs(source.map) && in_pairs(hidden) && source.inner % 2 == 0 &&
                (!source.gradient.data || in_pairs(source.gradient));
  }
  const int width = way.pairs ? 64 : 32;
  call.tiles = 0;
  for (int s = 0; s < call.maps; ++s) {
    call.source[s].first_tile = call.tiles;
    call.tiles += static_cast<int32_t>(blocks(call.source[s].map.channels, width));
  }
  way.staged = static_cast<int64_t>(call.batch) * call.height * call.width * 4 * buffers <= FASTFUSE_MOST_SHARED;
  return way;
}

// Calls `function` with a value of the maps' type and a number: channels taken at a time, or for whole channels 1 if they
// are held in shared memory and 2 if not.
template <typename F>
void with_way(const Call& call, const Way& way, F&& function) {
  const int type = call.source[0].map.type;
  using One = std::integral_constant<int, 1>;
  const auto typed = [&](auto number) {
    if (type == 0) {
      function(float{}, number);
    } else if (type == 1) {
      function(Half{}, number);
    } else {
      function(BFloat16{}, number);
    }
  };
  if (way.last ? way.pairs : !way.staged) {
    typed(std::integral_constant<int, 2>{});
  } else {
    typed(One{});
  }
}

inline Tensor table(const Tensor& like, int64_t rows, const Call& call, int64_t columns) {
  return torch::stable::new_empty(like, {rows, call.shares, call.channels * columns}, ScalarType::Float);
}

inline dim3 tile_grid(const Call& call) { return {static_cast<unsigned>(call.shares), static_cast<unsigned>(call.tiles)}; }

inline float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

inline size_t staged_bytes(const Call& call, const Way& way, int buffers) {
  return way.staged ? static_cast<size_t>(call.batch) * call.height * call.width * 4 * buffers : 0;
}

}  // namespace fastfuse
