// The operators that the sources beside this file implement. A schema that Python defines in the namespace `fastfuse`
// (fastfuse/kernels/<op>/autograd.py) is repeated here word for word; a test compares them. The others are pieces that a
// launcher in Python (fastfuse/kernels/<op>/cuda.py) joins with Triton kernels.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastfuse_cuda, m) {
  m.def("attention_map_fwd(Tensor[] features) -> Tensor");
  m.def("attention_map_bwd(Tensor cotangent, Tensor[] wanted, SymInt total) -> Tensor[]");
  m.def("attention_mse_fwd(Tensor[] inputs, Tensor[] targets, str reduction) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_mse_bwd(Tensor cotangent, Tensor maps, Tensor stats, Tensor[] wanted, int[] places, SymInt[] starts, "
      "str reduction) -> Tensor[]");
  m.def(
      "diversity_target_fwd(Tensor[] x, Tensor[] y, str mode, str reduction, bool shift) -> (Tensor, Tensor, Tensor[])");
  m.def(
      "diversity_target_bwd(Tensor cotangent, Tensor slope, Tensor[] x, int[] pairs, str reduction) -> Tensor[]");
  m.def(
      "concat_fuse_fwd_first(Tensor[] features, int[] counts, Tensor[] parameters, Tensor(a!)[] running, bool training, "
      "float[] options, Tensor(b!)[] hidden, Tensor(c!)[] statistics) -> ()");
  m.def(
      "concat_fuse_bwd_first(Tensor[] features, int[] counts, Tensor[] parameters, Tensor[] statistics, bool training, "
      "float[] options, Tensor(a!)[] of_hidden, Tensor(b!)[] gradients, bool[] needs) -> ()");
}
